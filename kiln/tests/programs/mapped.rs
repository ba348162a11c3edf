//! Run in guests: `mapped FILE` writes "mapped" over the beginning of a file by a shared mapping, as databases do.

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;

unsafe extern "C" {
    fn mmap(at: *mut u8, length: usize, protection: i32, flags: i32, file: i32, offset: i64) -> *mut u8;
    fn msync(at: *mut u8, length: usize, flags: i32) -> i32;
}

fn main() {
    let path = std::env::args().nth(1).unwrap();
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let words = b"mapped";
    // SAFETY: a new mapping of a file that has a page at least; PROT_READ | PROT_WRITE, MAP_SHARED, MS_SYNC.
    unsafe {
        let at = mmap(std::ptr::null_mut(), 4096, 3, 1, file.as_raw_fd(), 0);
        assert!(!at.is_null() && at as isize != -1, "{}", std::io::Error::last_os_error());
        std::ptr::copy_nonoverlapping(words.as_ptr(), at, words.len());
        assert_eq!(msync(at, 4096, 4), 0);
    }
}
