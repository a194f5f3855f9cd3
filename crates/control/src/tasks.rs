//! What the control plane does without being asked.

pub mod reconcile;
