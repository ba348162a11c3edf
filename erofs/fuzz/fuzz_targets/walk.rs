//! A hostile image gives an error: `cargo +nightly fuzz run walk fuzz/corpus/walk tests/samples`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = kiln_erofs::fuzzing::walk(bytes);
});
