//! A hostile host ends its link and nothing else: `cargo +nightly fuzz run guest fuzz/corpus/guest`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = kiln_link::fuzzing::guest(bytes);
});
