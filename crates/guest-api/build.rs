//! Generates the contract from the protocol files; protox stands in for protoc, so that cargo alone builds this crate.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["filesystem/filesystem.proto", "process/process.proto"];
    let descriptors = std::path::PathBuf::from(std::env::var("OUT_DIR")?).join("descriptors.bin");
    let set = protox::Compiler::new(["../../proto"])?
        .include_source_info(true)
        .include_imports(true)
        .open_files(files)?
        .encode_file_descriptor_set();
    std::fs::write(&descriptors, set)?;
    connectrpc_build::Config::new()
        .descriptor_set(&descriptors)
        .files(&files)
        .include_file("contract.rs")
        // It would name the descriptors, which this script itself writes: every build would be stale.
        .emit_rerun_directives(false)
        .compile()?;
    println!("cargo:rerun-if-changed=../../proto");
    Ok(())
}
