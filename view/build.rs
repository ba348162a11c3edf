//! Makes the messages and the service of `proto/router.proto`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let described = protox::compile(["router.proto"], ["proto"])?;
    tonic_prost_build::configure().compile_fds(described)?;
    Ok(())
}
