//! What a capsule may do in which state. Pure: no IO, and `now` is an argument.
