//! Supervision with plain programs, and the API with a real VMM. Needs root and cgroup 2, as the agent does.

mod api;
mod host;
mod hostile;
mod process;
