//! Imports a tar into a store and says how long that took: `import HOME TAR [gzip]`. TAR may be `-`.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::fs::File;
use std::io::Read;
use std::time::Instant;

use kiln_contract::Home;
use kiln_store::{ImportLimits, Store};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(home), Some(tar)) = (args.next(), args.next()) else {
        return Err("usage: import HOME TAR [gzip]".into());
    };
    let gzip = args.next().is_some_and(|word| word == "gzip");
    let input: Box<dyn Read + Send> =
        if tar == "-" { Box::new(std::io::stdin()) } else { Box::new(File::open(&tar)?) };
    let input: Box<dyn Read + Send> =
        if gzip { Box::new(flate2::read::MultiGzDecoder::new(input)) } else { input };

    let store = Store::open(&Home::at(std::path::absolute(home)?))?;
    let start = Instant::now();
    let layer = store.import_tar(input, None, ImportLimits::default())?;
    let imported = start.elapsed();
    let start = Instant::now();
    let tree = store.merged_tree(&[layer.layer])?;
    let merged = start.elapsed();
    println!("layer    {}", layer.layer);
    println!("diff_id  {}", layer.diff_id);
    println!(
        "entries  {}, tar {} bytes, new objects {} bytes",
        layer.entries, layer.tar_size, layer.new_object_bytes
    );
    println!(
        "imported in {:.3} s, merged in {:.3} s: {}",
        imported.as_secs_f64(),
        merged.as_secs_f64(),
        tree.display()
    );
    Ok(())
}
