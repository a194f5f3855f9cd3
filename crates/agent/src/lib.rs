//! The host agent: one driver task per capsule.
