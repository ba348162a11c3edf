//! Directories that are being changed while they become layers.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use common::{Fixture, fixture};
use kiln_erofs::{Content, Data, NodeId, Tree};
use kiln_store::{ImportedLayer, Result, StoreError};

/// How long what changes is at rest between two changes.
struct Rest(AtomicU64);

impl Rest {
    fn of(millis: u64) -> Self {
        Self(AtomicU64::new(millis))
    }

    /// The host is too busy to read everything in so short a time.
    fn lengthen(&self) {
        self.0.fetch_add(self.0.load(Ordering::Relaxed) / 2, Ordering::Relaxed);
    }
}

/// Runs `act` while another thread does `change` again and again; as often as it was done is its argument.
fn while_changing<T>(rest: &Rest, change: impl Fn(u32) + Sync, act: impl FnOnce() -> T) -> T {
    let (done, rounds) = (AtomicBool::new(false), AtomicU32::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                change(rounds.fetch_add(1, Ordering::Relaxed));
                thread::sleep(Duration::from_millis(rest.0.load(Ordering::Relaxed)));
            }
        });
        while rounds.load(Ordering::Relaxed) == 0 {
            thread::yield_now();
        }
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act));
        done.store(true, Ordering::Relaxed);
        outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Commits again and again while `change` goes on, until `least` layers were made; what they are is looked at.
fn commit_while_changing(
    fixture: &Fixture,
    (rest, change): (Rest, impl Fn(u32) + Sync),
    least: u32,
    mut look: impl FnMut(&ImportedLayer),
) {
    let upper = fixture.dir.path().join("upper");
    let mut whole = 0;
    while_changing(&rest, change, || {
        for _ in 0..200 {
            match commit(fixture, &upper) {
                Ok(layer) => {
                    look(&layer);
                    whole += 1;
                }
                Err(StoreError::Changing { .. }) => rest.lengthen(),
                Err(error) => panic!("{error}"),
            }
            if whole == least {
                return;
            }
        }
    });
    assert_eq!(whole, least, "it was at rest now and then");
}

fn commit(fixture: &Fixture, upper: &Path) -> Result<ImportedLayer> {
    fixture.store.import_upper(upper, &[], &|id, _| id)
}

fn tree(fixture: &Fixture, layer: &ImportedLayer) -> Tree {
    let bytes = fs::read(fixture.store.layer_path(&layer.layer)).unwrap();
    kiln_erofs::Image::open(&bytes).unwrap().to_tree().unwrap()
}

fn bytes_of(fixture: &Fixture, layer: &ImportedLayer, name: &str) -> Vec<u8> {
    let tree = tree(fixture, layer);
    match tree.node(tree.child(NodeId::ROOT, name.as_bytes()).unwrap()).content {
        Content::Regular(Data::Inline(bytes)) => bytes.clone(),
        Content::Regular(Data::Object { digest, .. }) => fs::read(fixture.store.object_path(digest)).unwrap(),
        other => panic!("{name} is {other:?}"),
    }
}

#[test]
fn a_file_that_is_written_all_the_time_is_named() {
    let fixture = fixture();
    let upper = fixture.dir.path().join("upper");
    fs::create_dir(&upper).unwrap();
    let (path, size) = (upper.join("log"), 24 << 20);
    fs::write(&path, vec![1; size]).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    let change = |round: u32| file.write_all_at(&round.to_ne_bytes(), size as u64 / 2).unwrap();
    let refused = while_changing(&Rest::of(0), change, || commit(&fixture, &upper)).unwrap_err();
    assert!(matches!(&refused, StoreError::Changing { path: named, .. } if *named == path), "{refused}");
    assert!(refused.to_string().contains("upper/log") && refused.hint().is_some());
    assert!(fixture.is_untouched());
    // At rest it is taken as it is.
    let layer = commit(&fixture, &upper).unwrap();
    assert!(bytes_of(&fixture, &layer, "log") == fs::read(&path).unwrap());
}

#[test]
fn a_file_is_never_half_of_one_time_and_half_of_another() {
    let fixture = fixture();
    let upper = fixture.dir.path().join("upper");
    fs::create_dir(&upper).unwrap();
    let size = 8 << 20;
    let file = File::create(upper.join("file")).unwrap();
    let change = |round: u32| file.write_all_at(&vec![round as u8; size], 0).unwrap();
    // It is not empty, or half as long, at any moment at which it may be seen.
    change(255);
    commit_while_changing(&fixture, (Rest::of(60), change), 6, |layer| {
        let bytes = bytes_of(&fixture, layer, "file");
        assert!(bytes.len() == size && bytes.iter().all(|byte| *byte == bytes[0]));
    });
}

#[test]
fn a_file_that_moves_from_directory_to_directory_is_in_one_of_them() {
    let fixture = fixture();
    let upper = fixture.dir.path().join("upper");
    // So many that the walk takes a while between the two.
    for name in ["a", "b", "c", "d"] {
        fs::create_dir_all(upper.join(name)).unwrap();
        for index in 0..200 {
            fs::write(upper.join(name).join(index.to_string()), "").unwrap();
        }
    }
    fs::write(upper.join("a/x"), vec![7; 5000]).unwrap();
    let change = |round: u32| {
        let (from, to) = if round.is_multiple_of(2) { ("a/x", "d/x") } else { ("d/x", "a/x") };
        fs::rename(upper.join(from), upper.join(to)).unwrap();
    };
    commit_while_changing(&fixture, (Rest::of(40), change), 8, |layer| {
        let tree = tree(&fixture, layer);
        let has = |name: &[u8]| tree.child(tree.child(NodeId::ROOT, name).unwrap(), b"x").is_some();
        assert!(has(b"a") != has(b"d"), "in both or in none");
    });
}

#[test]
fn what_comes_and_goes_is_there_or_not_but_never_an_error_once_it_rests() {
    let fixture = fixture();
    let upper = fixture.dir.path().join("upper");
    fs::create_dir_all(&upper).unwrap();
    let change = |round: u32| {
        let directory = upper.join("sub");
        match round % 4 {
            0 => fs::create_dir(&directory).unwrap(),
            1 => fs::write(directory.join("file"), vec![1; 300]).unwrap(),
            2 => fs::remove_dir_all(&directory).unwrap(),
            _ => {
                // Another kind of file under the same name.
                std::os::unix::fs::symlink("x", &directory).unwrap();
                fs::remove_file(&directory).unwrap();
            }
        }
    };
    commit_while_changing(&fixture, (Rest::of(15), change), 15, |_| ());
}
