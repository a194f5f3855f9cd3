//! Real capsules by a real agent.

mod common;
mod killed;
mod pause;
mod points;
mod start;
