//! Keeping a supervisor small: starting a workload takes more memory than looking after it.

use std::fs;

/// Gives back what starting took: free pages of the heap, and the program's own code, of which supervising needs little.
/// Code that is needed again is read again from the page cache, where it stays as long as any `kiln` runs.
pub(super) fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes no pointers; returns free pages of the heap to the kernel.
    unsafe {
        libc::malloc_trim(0);
    }
    for (start, end) in unwritten(&fs::read_to_string("/proc/self/maps").unwrap_or_default()) {
        // SAFETY: these mappings are of files and have never been writable, so that every page of them is the file's:
        // the kernel maps it again when it is touched. A failure leaves things as they were.
        unsafe {
            libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED);
        }
    }
}

/// The mappings of code and constants in the text of `/proc/self/maps` (proc_pid_maps(5)). What the linker has relocated
/// is not among them: it was writable once, and begins later in its file.
fn unwritten(maps: &str) -> Vec<(usize, usize)> {
    maps.lines()
        .filter_map(|line| {
            let mut fields = line.split_ascii_whitespace();
            let (range, permissions, offset) = (fields.next()?, fields.next()?, fields.next()?);
            let path = fields.nth(2)?;
            let offset = u64::from_str_radix(offset, 16).ok()?;
            let code = permissions == "r-xp";
            let constants = permissions == "r--p" && offset == 0;
            if !path.starts_with('/') || !(code || constants) {
                return None;
            }
            let (start, end) = range.split_once('-')?;
            Some((usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_and_constants_of_files_are_given_back() {
        let maps = "\
1000-2000 r--p 00000000 fe:00 12  /usr/bin/kiln
2000-5000 r-xp 00001000 fe:00 12  /usr/bin/kiln
5000-6000 r--p 00004000 fe:00 12  /usr/bin/kiln
6000-7000 rw-p 00005000 fe:00 12  /usr/bin/kiln
7000-8000 rw-p 00000000 00:00 0   [heap]
8000-9000 r-xp 00000000 00:00 0   [vdso]
9000-a000 r-xp 00000000 00:00 0
";
        assert_eq!(unwritten(maps), [(0x1000, 0x2000), (0x2000, 0x5000)]);
    }

    #[test]
    fn the_program_goes_on_with_its_code_given_back() {
        give_back();
        assert!(!unwritten(&fs::read_to_string("/proc/self/maps").unwrap()).is_empty());
    }
}
