//! Public REST types, ids, error codes, limits and defaults. Pure: no IO, and no clock.

pub mod id;
