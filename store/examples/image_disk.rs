//! Renders the image disk of an image and says how long that took: `image_disk HOME IMAGE [again]`. With `again`, one
//! that is there is made anew. How far it is goes to standard error.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::sync::Mutex;
use std::time::Instant;

use kiln_contract::{ByteSize, Home, Progress, Step, StepId};
use kiln_store::Store;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(home), Some(image)) = (args.next(), args.next()) else {
        return Err("usage: image_disk HOME IMAGE [again]".into());
    };
    let store = Store::open(&Home::at(std::path::absolute(home)?))?;
    let image = store.resolve(&image)?;
    if args.next().is_some_and(|word| word == "again") {
        std::fs::remove_file(store.image_disk(&image.layers, &Tenths::default())?)?;
    }
    let start = Instant::now();
    let disk = store.image_disk(&image.layers, &Tenths::default())?;
    let taken = start.elapsed();
    let usage = store.usage()?;
    println!("disk      {}", disk.display());
    println!("length    {}", ByteSize(disk.metadata()?.len()));
    println!("exclusive {} of {} disk(s)", ByteSize(usage.image_disk_bytes), usage.image_disks);
    println!("made in   {:.3} s", taken.as_secs_f64());
    Ok(())
}

/// A line for each tenth.
#[derive(Default)]
struct Tenths(Mutex<(u64, u64)>);

impl Progress for Tenths {
    fn begin(&self, step: Step) -> StepId {
        if let Ok(mut state) = self.0.lock() {
            *state = (0, step.total.unwrap_or(0));
        }
        eprintln!("{} {}", step.verb, step.name);
        StepId(0)
    }

    fn advance(&self, _: StepId, bytes: i64) {
        let Ok(mut state) = self.0.lock() else { return };
        let (done, total) = *state;
        let now = done.saturating_add_signed(bytes);
        *state = (now, total);
        if total > 0 && now * 10 / total > done * 10 / total {
            eprintln!("{} of {}", ByteSize(now), ByteSize(total));
        }
    }

    fn end(&self, _: StepId, outcome: &str) {
        eprintln!("{outcome}");
    }

    fn note(&self, text: &str) {
        eprintln!("{text}");
    }
}
