//! Directories that are being changed while they become layers.

mod common;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use common::{Fixture, fixture};
use kiln_erofs::{Content, Data, NodeId, Tree};
use kiln_store::{ImportedLayer, Result, StoreError};

/// Runs `act` while another thread does `change` again and again, `pause` apart; as often as it was done is its argument.
fn while_changing<T>(pause: Duration, change: impl Fn(u32) + Sync, act: impl FnOnce() -> T) -> T {
    let (done, rounds) = (AtomicBool::new(false), AtomicU32::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                change(rounds.fetch_add(1, Ordering::Relaxed));
                if !pause.is_zero() {
                    thread::sleep(pause);
                }
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
    let refused = while_changing(Duration::ZERO, change, || commit(&fixture, &upper)).unwrap_err();
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
    let mut whole = 0;
    while_changing(Duration::from_millis(60), change, || {
        for _ in 0..12 {
            match commit(&fixture, &upper) {
                Ok(layer) => {
                    let bytes = bytes_of(&fixture, &layer, "file");
                    assert!(bytes.len() == size && bytes.iter().all(|byte| *byte == bytes[0]));
                    whole += 1;
                }
                Err(StoreError::Changing { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
    });
    assert!(whole > 0, "it was at rest now and then");
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
    let mut seen = BTreeSet::new();
    while_changing(Duration::from_millis(40), change, || {
        for _ in 0..15 {
            match commit(&fixture, &upper) {
                Ok(layer) => {
                    let tree = tree(&fixture, &layer);
                    let has =
                        |name: &[u8]| tree.child(tree.child(NodeId::ROOT, name).unwrap(), b"x").is_some();
                    assert!(has(b"a") != has(b"d"), "in both or in none");
                    seen.insert(has(b"a"));
                }
                Err(StoreError::Changing { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
    });
    assert!(!seen.is_empty(), "the directories were at rest now and then");
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
    let outcomes = while_changing(Duration::from_millis(15), change, || {
        (0..30).map(|_| commit(&fixture, &upper)).collect::<Vec<_>>()
    });
    for outcome in &outcomes {
        assert!(matches!(outcome, Ok(_) | Err(StoreError::Changing { .. })), "{outcome:?}");
    }
    assert!(outcomes.iter().any(Result::is_ok));
}
