//! What is no message is an error, and what is one is written as it was read: `cargo +nightly fuzz run messages fuzz/corpus/messages`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = kiln_link::fuzzing::messages(bytes);
});
