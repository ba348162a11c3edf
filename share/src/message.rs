//! The requests of 9P2000.L, as Linux's client writes them (`include/net/9p/9p.h`, `net/9p/client.c`).

use crate::wire::{Data, Decoder, Field, Malformed, Names};

/// Declares the requests: kind, name, and fields in the order in which they stand in the body.
macro_rules! requests {
    ($($kind:literal $name:ident { $($field:ident: $type:ty),* $(,)? })*) => {
        /// A request. Its reply's kind is one more than its own.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum Request<'a> {
            $($name { $($field: $type),* },)*
        }

        impl<'a> Request<'a> {
            /// Reads the body of a request of this kind; `None`: no such kind.
            pub(crate) fn decode(kind: u8, body: &'a [u8]) -> Option<Result<Self, Malformed>> {
                let mut from = Decoder::new(body);
                let decoded = match kind {
                    $($kind => (|| Ok(Self::$name { $($field: Field::decode(&mut from)?),* }))(),)*
                    _ => return None,
                };
                Some(decoded.and_then(|request| from.finish().map(|()| request)))
            }
        }
    };
}

requests! {
    8 Statfs { fid: u32 }
    12 Lopen { fid: u32, flags: u32 }
    14 Lcreate { fid: u32, name: &'a [u8], flags: u32, mode: u32, gid: u32 }
    16 Symlink { directory: u32, name: &'a [u8], target: &'a [u8], gid: u32 }
    18 Mknod { directory: u32, name: &'a [u8], mode: u32, major: u32, minor: u32, gid: u32 }
    20 Rename { fid: u32, directory: u32, name: &'a [u8] }
    22 Readlink { fid: u32 }
    24 Getattr { fid: u32, mask: u64 }
    26 Setattr {
        fid: u32,
        valid: u32,
        mode: u32,
        uid: u32,
        gid: u32,
        size: u64,
        atime_seconds: u64,
        atime_nanoseconds: u64,
        mtime_seconds: u64,
        mtime_nanoseconds: u64,
    }
    30 Xattrwalk { fid: u32, new: u32, name: &'a [u8] }
    32 Xattrcreate { fid: u32, name: &'a [u8], size: u64, flags: u32 }
    40 Readdir { fid: u32, offset: u64, count: u32 }
    50 Fsync { fid: u32, only_data: u32 }
    52 Lock {
        fid: u32,
        kind: u8,
        flags: u32,
        start: u64,
        length: u64,
        process: u32,
        client: &'a [u8],
    }
    54 Getlock { fid: u32, kind: u8, start: u64, length: u64, process: u32, client: &'a [u8] }
    70 Link { directory: u32, fid: u32, name: &'a [u8] }
    72 Mkdir { directory: u32, name: &'a [u8], mode: u32, gid: u32 }
    74 Renameat { from: u32, old: &'a [u8], to: u32, new: &'a [u8] }
    76 Unlinkat { directory: u32, name: &'a [u8], flags: u32 }
    100 Version { message_size: u32, version: &'a [u8] }
    102 Auth { fid: u32, user_name: &'a [u8], tree: &'a [u8], user: u32 }
    104 Attach { fid: u32, auth: u32, user_name: &'a [u8], tree: &'a [u8], user: u32 }
    108 Flush { old: u16 }
    110 Walk { fid: u32, new: u32, names: Names<'a> }
    116 Read { fid: u32, offset: u64, count: u32 }
    118 Write { fid: u32, offset: u64, data: Data<'a> }
    120 Clunk { fid: u32 }
    122 Remove { fid: u32 }
}

/// The reply to a request that failed; its body is an error number of Linux.
pub(crate) const RLERROR: u8 = 7;
/// The first request of a session.
pub(crate) const TVERSION: u8 = 100;
/// Takes a request back.
pub(crate) const TFLUSH: u8 = 108;

/// The only version that is spoken.
pub(crate) const VERSION: &[u8] = b"9P2000.L";
/// The answer to every other.
pub(crate) const UNKNOWN_VERSION: &[u8] = b"unknown";
/// What stands where there is no fid (`P9_NOFID`), no user (`P9_NONUNAME`).
pub(crate) const NONE: u32 = u32::MAX;

/// The flags of `Tlopen` and `Tlcreate` (`P9_DOTL_*`), the same on all processors.
pub(crate) mod open {
    pub(crate) const ACCESS: u32 = 0o3;
    pub(crate) const WRITE_ONLY: u32 = 0o1;
    pub(crate) const READ_WRITE: u32 = 0o2;
    pub(crate) const CREATE: u32 = 0o100;
    pub(crate) const EXCLUSIVE: u32 = 0o200;
    pub(crate) const TRUNCATE: u32 = 0o1000;
    pub(crate) const APPEND: u32 = 0o2000;
    pub(crate) const DATA_SYNC: u32 = 0o10000;
    pub(crate) const DIRECTORY: u32 = 0o200_000;
    pub(crate) const SYNC: u32 = 0o4_000_000;
}

/// Which attributes `Tgetattr` asks for and its reply has (`P9_STATS_*`).
pub(crate) mod have {
    /// From the mode to the number of blocks.
    pub(crate) const BASIC: u64 = 0x7ff;
    pub(crate) const BIRTH: u64 = 0x800;
    pub(crate) const GENERATION: u64 = 0x1000;
}

/// Which attributes `Tsetattr` sets (`P9_ATTR_*`).
pub(crate) mod set {
    pub(crate) const MODE: u32 = 1;
    pub(crate) const UID: u32 = 1 << 1;
    pub(crate) const GID: u32 = 1 << 2;
    pub(crate) const SIZE: u32 = 1 << 3;
    pub(crate) const ATIME: u32 = 1 << 4;
    pub(crate) const MTIME: u32 = 1 << 5;
    pub(crate) const CTIME: u32 = 1 << 6;
    /// To the time that is given, not to the present.
    pub(crate) const ATIME_GIVEN: u32 = 1 << 7;
    pub(crate) const MTIME_GIVEN: u32 = 1 << 8;
    pub(crate) const ALL: u32 = (1 << 9) - 1;
}

/// `Tunlinkat`'s flag for directories (`P9_DOTL_AT_REMOVEDIR`).
pub(crate) const UNLINK_DIRECTORY: u32 = 0x200;

/// The kinds of locks (`P9_LOCK_TYPE_*`), flags and outcomes.
pub(crate) mod lock {
    pub(crate) const READ: u8 = 0;
    pub(crate) const WRITE: u8 = 1;
    pub(crate) const UNLOCK: u8 = 2;
    /// The client waits for the lock (`P9_LOCK_FLAGS_BLOCK`).
    pub(crate) const WAIT: u32 = 1;
    pub(crate) const SUCCESS: u8 = 0;
    pub(crate) const BLOCKED: u8 = 1;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_are_taken_whole_or_not_at_all() {
        let read = [1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0];
        let expected = Request::Read { fid: 1, offset: 2, count: 3 };
        assert_eq!(Request::decode(116, &read), Some(Ok(expected)));
        for length in 0..read.len() {
            assert_eq!(Request::decode(116, &read[..length]), Some(Err(Malformed)), "{length}");
        }
        assert_eq!(Request::decode(116, &[&read[..], &[0]].concat()), Some(Err(Malformed)));
        assert_eq!(Request::decode(117, &read), None, "a reply is no request");
    }

    #[test]
    fn a_string_inside_a_body_may_hold_any_bytes() {
        let mkdir = [9, 0, 0, 0, 3, 0, 0xff, b'/', 0, 0o755u16 as u8, 1, 0, 0, 4, 0, 0, 0];
        let expected = Request::Mkdir { directory: 9, name: &[0xff, b'/', 0], mode: 0o755, gid: 4 };
        assert_eq!(Request::decode(72, &mkdir), Some(Ok(expected)));
    }
}
