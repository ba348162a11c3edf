//! Commits an upper directory with one changed file on top of a layer, several times, and says how long that took:
//! `commit HOME LAYER`.
#![allow(clippy::print_stdout)]

use std::time::Instant;

use kiln_contract::{Digest, Home};
use kiln_store::{ImageName, Store};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(home), Some(layer)) = (args.next(), args.next()) else {
        return Err("usage: commit HOME LAYER".into());
    };
    let base: Digest = layer.parse()?;
    let home = Home::at(std::path::absolute(home)?);
    let upper = std::env::temp_dir().join(format!("kiln-store-commit-{}", std::process::id()));
    std::fs::create_dir_all(upper.join("etc"))?;
    for round in 0..5 {
        std::fs::write(
            upper.join("etc/changed"),
            format!("{round} {:?} ", std::time::SystemTime::now()).repeat(100),
        )?;
        let start = Instant::now();
        let store = Store::open(&home)?;
        let opened = start.elapsed();
        let top = store.import_upper(&upper, &[base], &|id, _| id)?.layer;
        let imported = start.elapsed();
        let image = store.make_image(&Default::default(), &[base, top])?;
        store.tag(&ImageName::parse("bench/commit:1")?, &image.manifest_digest, "commit")?;
        let committed = start.elapsed();
        store.merged_tree(&image.layers)?;
        let merged = start.elapsed();
        println!(
            "open {:.3} ms, import {:.1} ms, image and tag {:.1} ms: commit {:.1} ms; merged tree of the first run {:.1} ms",
            opened.as_secs_f64() * 1e3,
            (imported - opened).as_secs_f64() * 1e3,
            (committed - imported).as_secs_f64() * 1e3,
            committed.as_secs_f64() * 1e3,
            (merged - committed).as_secs_f64() * 1e3
        );
    }
    std::fs::remove_dir_all(&upper)?;
    Ok(())
}
