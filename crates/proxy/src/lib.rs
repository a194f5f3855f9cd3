//! The reverse proxy between control plane, host agent and guest.
