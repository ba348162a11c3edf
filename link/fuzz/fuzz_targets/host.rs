//! A hostile guest ends its session and nothing else: `cargo +nightly fuzz run host fuzz/corpus/host`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = kiln_link::fuzzing::host(bytes);
});
