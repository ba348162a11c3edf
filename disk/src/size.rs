//! Which sizes disks can have.

use crate::template::{BLOCK, LARGEST, SMALLEST};
use crate::{DiskError, Result};

/// The size of a new disk for which `wanted` bytes were asked: a multiple of [`BLOCK`].
pub(crate) fn of_new(wanted: u64) -> Result<u64> {
    if !(SMALLEST..=LARGEST).contains(&wanted) {
        return Err(DiskError::BadSize { size: wanted });
    }
    Ok(wanted.next_multiple_of(BLOCK))
}

/// The size of a disk that has `has` bytes and was asked to have `wanted`.
pub(crate) fn of_grown(what: impl FnOnce() -> String, has: u64, wanted: u64) -> Result<u64> {
    if wanted.checked_next_multiple_of(BLOCK).is_some_and(|wanted| wanted < has) {
        return Err(DiskError::Shrink { what: what(), size: has, wanted });
    }
    of_new(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_whole_blocks_within_what_the_file_system_can_have() {
        let grown = |has, wanted| of_grown(|| "the disk `d`".into(), has, wanted);
        for (wanted, size) in
            [(SMALLEST, SMALLEST), (SMALLEST + 1, SMALLEST + 4096), (10 << 30, 10 << 30), (LARGEST, LARGEST)]
        {
            assert_eq!(of_new(wanted).unwrap(), size);
            assert_eq!(grown(SMALLEST, wanted).unwrap(), size);
        }
        for wanted in [0, SMALLEST - 1, LARGEST + 1, u64::MAX] {
            assert!(matches!(of_new(wanted), Err(DiskError::BadSize { .. })), "{wanted}");
        }
        assert_eq!(
            grown(SMALLEST + 4096, SMALLEST + 1).unwrap(),
            SMALLEST + 4096,
            "the same was asked for twice"
        );
        assert!(matches!(grown(SMALLEST, u64::MAX), Err(DiskError::BadSize { .. })));
        let error = grown(10 << 30, 9 << 30).unwrap_err().to_string();
        assert_eq!(
            error,
            "cannot shrink the disk `d` from 10.0 GiB to 9.0 GiB (10737418240 to 9663676416 bytes): it can only grow"
        );
    }
}
