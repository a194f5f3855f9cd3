//! The object store against a folder and against a real S3 server.

mod collecting;
mod damage;
mod faults;
mod lazy;
mod uploading;
mod world;
