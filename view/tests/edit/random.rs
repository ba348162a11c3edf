//! Operations by chance. The same number gives the same ones.

use crate::operations::{Op, SLOTS};

/// SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn pick<'a>(&mut self, from: &[&'a str]) -> &'a str {
        from[self.below(from.len() as u64) as usize]
    }

    fn bytes(&mut self) -> Vec<u8> {
        let length = [0, 5, 70, 4096, 9000, 40_000][self.below(6) as usize] + self.below(50);
        let first = self.next();
        (0..length).map(|index| (first.wrapping_mul(index | 1) >> 7) as u8).collect()
    }

    /// Few names, so that much happens to the same ones.
    fn path(&mut self) -> String {
        const DIRECTORIES: &[&str] = &["", "a", "a/sub", "b", "c", "n", "a/n", "b/sub", "n/sub", "c/n"];
        const NAMES: &[&str] = &["f", "g", "large", "small", "link", "sub", "n", "twin", "new"];
        let (directory, name) = (self.pick(DIRECTORIES), self.pick(NAMES));
        match (directory, self.below(4)) {
            ("", 0) => self.pick(&["a", "b", "c", "n"]).to_owned(),
            ("", _) => name.to_owned(),
            (directory, 0) => directory.to_owned(),
            (directory, _) => format!("{directory}/{name}"),
        }
    }

    fn offset(&mut self) -> u64 {
        self.below(60_000)
    }

    fn slot(&mut self) -> usize {
        self.below(SLOTS as u64) as usize
    }

    fn mode(&mut self) -> u32 {
        [0o644, 0o755, 0o600, 0o4755, 0o2755, 0o1777][self.below(6) as usize]
    }

    /// What one file may be put through, as fsx does.
    pub(crate) fn on_data(&mut self) -> Op {
        let path = ["a/large", "a/small", "new", "a/twin"][self.below(4) as usize].to_owned();
        match self.below(17) {
            0 => Op::Create(path, 0o644, self.bytes()),
            1 => Op::Overwrite(path, self.bytes()),
            2 | 3 => Op::WriteAt(path, self.offset(), self.bytes()),
            4 => Op::Append(path, self.bytes()),
            5 => Op::Truncate(path, self.offset()),
            6 => Op::Read(path),
            7 => Op::Open(self.slot(), path, self.below(2) == 0),
            8 => Op::HandleRead(self.slot(), self.offset(), 20_000),
            9 | 10 => Op::HandleWrite(self.slot(), self.offset(), self.bytes()),
            11 => Op::HandleTruncate(self.slot(), self.offset()),
            12 => Op::HandleAllocate(self.slot(), self.offset(), 1 + self.offset()),
            13 => Op::HandlePunch(self.slot(), self.offset(), 1 + self.offset()),
            14 => Op::HandleStat(self.slot()),
            15 => Op::Map(path, self.offset(), self.bytes()),
            _ => Op::CopyRange("a/large".into(), path),
        }
    }

    /// What names may be put through.
    pub(crate) fn on_names(&mut self) -> Op {
        match self.below(36) {
            0..3 => Op::Create(self.path(), self.mode(), self.bytes()),
            3 => Op::Overwrite(self.path(), self.bytes()),
            4 => Op::Append(self.path(), self.bytes()),
            5 => Op::Read(self.path()),
            6 => Op::List(self.path()),
            7 => Op::Chmod(self.path(), self.mode()),
            8 => Op::Chown(self.path(), self.below(3) as u32, self.below(3) as u32),
            9 => Op::Times(self.path(), self.below(1 << 32) as i64 - (1 << 31)),
            10..13 => Op::Unlink(self.path()),
            13..15 => Op::Rmdir(self.path()),
            15..17 => Op::Mkdir(self.path(), self.mode()),
            17..21 => Op::Rename(self.path(), self.path()),
            21 => Op::RenameNew(self.path(), self.path()),
            22..24 => Op::Exchange(self.path(), self.path()),
            24..26 => Op::Link(self.path(), self.path()),
            26 => Op::Symlink("f".into(), self.path()),
            27 => Op::Fifo(self.path()),
            28 => Op::SetXattr(self.path(), "user.x".into(), vec![1; 9]),
            29 => Op::RemoveXattr(self.path(), "user.x".into()),
            30 => Op::Stat(self.path()),
            31 => Op::Open(self.slot(), self.path(), self.below(2) == 0),
            32 => Op::HandleWrite(self.slot(), self.offset() / 10, self.bytes()),
            33 => Op::HandleRead(self.slot(), 0, 70_000),
            34 => Op::HandleChmod(self.slot(), self.mode()),
            _ => Op::HandleStat(self.slot()),
        }
    }
}
