//! The guest agent: init and process server inside a capsule.
