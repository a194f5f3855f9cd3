//! Real capsules by a real agent.

mod audit;
mod common;
mod disks;
mod endurance;
mod held;
mod hibernated;
mod killed;
mod pause;
mod points;
mod record;
mod remote;
mod room;
mod slots;
mod start;
