//! What is done rarely, and then must be right: nodes, locks, holes, and what is told of files and of the file system.

use rustix::fs::FileType;

use crate::operations::{Lock, Op, Owner};
use crate::table::{b, s};

/// Cases by name.
pub(crate) fn special() -> Vec<(&'static str, Vec<Op>)> {
    vec![nodes(), flocks(), locks_of_open_files(), locks_of_processes(), holes(), links(), synced()]
}

fn nodes() -> (&'static str, Vec<Op>) {
    let node = |path: &str, kind, mode, device| Op::Node(s(path), kind, mode, device);
    let operations = vec![
        node("a/null", FileType::CharacterDevice, 0o666, (1, 3)),
        node("a/sub/disk", FileType::BlockDevice, 0o4640, (7, 200_000)),
        node("a/many", FileType::CharacterDevice, 0o600, (4000, 255)),
        // This has the numbers of a mark of the scratch, but not its kind.
        node("a/none", FileType::BlockDevice, 0o600, (0, 0)),
        node("a/socket", FileType::Socket, 0o751, (0, 0)),
        node("a/pipe", FileType::Fifo, 0o620, (0, 0)),
        node("a/file", FileType::RegularFile, 0o640, (0, 0)),
        node("a/null", FileType::CharacterDevice, 0o666, (1, 3)),
        node("a/small", FileType::BlockDevice, 0o666, (1, 3)),
        node("none/null", FileType::CharacterDevice, 0o666, (1, 3)),
        Op::List(s("a")),
        // Where something of the tree was removed.
        Op::Unlink(s("b/small")),
        node("b/small", FileType::CharacterDevice, 0o604, (5, 1)),
        Op::Chmod(s("b/small"), 0o600),
        Op::Chown(s("b/small"), 3, 4),
        Op::Rename(s("b/small"), s("c/large")),
        Op::Stat(s("c/large")),
        Op::Stat(s("b/small")),
        Op::Link(s("a/sub/disk"), s("n")),
        Op::Unlink(s("a/sub/disk")),
        Op::Stat(s("n")),
        Op::Socket(s("b/s")),
        Op::Stat(s("b/s")),
        Op::Socket(s("b/s")),
        Op::Unlink(s("b/s")),
        Op::Socket(s("b/s")),
    ];
    ("devices, sockets and pipes are made", operations)
}

fn flocks() -> (&'static str, Vec<Op>) {
    use Lock::{Exclusive, Released, Shared};
    let large = || s("a/large");
    let operations = vec![
        Op::Open(0, large(), false),
        Op::Open(1, large(), false),
        Op::Open(2, s("a/small"), true),
        Op::Flock(0, Shared),
        Op::Flock(1, Shared),
        Op::Flock(1, Exclusive),
        // That another file is locked is no matter here.
        Op::Flock(2, Exclusive),
        Op::Flock(0, Released),
        Op::Flock(1, Exclusive),
        Op::Flock(0, Shared),
        // The copy is the same file to who has it locked.
        Op::Append(large(), b("copied")),
        Op::Flock(0, Shared),
        Op::Open(3, large(), true),
        Op::Flock(3, Exclusive),
        Op::Rename(large(), s("n")),
        Op::Flock(3, Exclusive),
        Op::Open(4, s("n"), true),
        Op::Flock(4, Shared),
        // Closing releases.
        Op::Close(1),
        Op::Flock(4, Exclusive),
        Op::Flock(0, Shared),
        Op::Unlink(s("n")),
        Op::Flock(3, Shared),
        Op::Close(4),
        Op::Flock(3, Shared),
    ];
    ("files are locked (flock)", operations)
}

fn locks_of_open_files() -> (&'static str, Vec<Op>) {
    use Lock::{Exclusive, Released, Shared};
    use Owner::OpenFile;
    let set = |slot, lock, range| Op::LockRange(slot, OpenFile, lock, range);
    let ask = |slot, lock, range| Op::InTheWay(slot, OpenFile, lock, range);
    let operations = vec![
        Op::Open(0, s("a/large"), true),
        Op::Open(1, s("a/large"), true),
        Op::Open(2, s("a/large"), false),
        set(0, Exclusive, 10..20),
        set(1, Exclusive, 20..30),
        set(1, Shared, 15..25),
        ask(1, Shared, 0..100),
        ask(0, Shared, 0..15),
        ask(0, Shared, 0..100),
        set(0, Released, 12..15),
        set(1, Exclusive, 12..15),
        ask(2, Shared, 11..13),
        ask(2, Shared, 30..31),
        // Who may not write may not lock others out.
        set(2, Exclusive, 90..91),
        set(2, Shared, 90..91),
        set(0, Exclusive, 0..200),
        Op::HandleWrite(1, 5, b("copied")),
        ask(0, Exclusive, 90..91),
        Op::Close(1),
        set(0, Exclusive, 10..30),
        ask(2, Shared, 0..1000),
        Op::Close(0),
        ask(2, Shared, 0..1000),
    ];
    ("bytes are locked for who has opened a file", operations)
}

fn locks_of_processes() -> (&'static str, Vec<Op>) {
    use Lock::{Exclusive, Released, Shared};
    use Owner::{OpenFile, Process};
    let operations = vec![
        Op::Open(0, s("b/large"), true),
        Op::Open(1, s("b/large"), true),
        Op::LockRange(0, Process, Exclusive, 0..100),
        // One process is never in its own way, but in that of an open file.
        Op::LockRange(1, Process, Exclusive, 50..150),
        Op::InTheWay(1, Process, Exclusive, 0..100),
        Op::InTheWay(1, OpenFile, Shared, 0..200),
        Op::LockRange(1, OpenFile, Shared, 0..200),
        Op::LockRange(1, Process, Released, 20..40),
        Op::LockRange(1, OpenFile, Shared, 20..40),
        Op::LockRange(0, Process, Exclusive, 30..31),
        Op::InTheWay(0, Process, Exclusive, 0..200),
        Op::LockRange(0, Process, Shared, 30..31),
        // Closing any of the process's releases all that it has.
        Op::Open(2, s("b/large"), false),
        Op::InTheWay(1, OpenFile, Exclusive, 0..200),
        Op::Close(2),
        Op::InTheWay(1, OpenFile, Exclusive, 0..200),
    ];
    ("bytes are locked for a process", operations)
}

fn holes() -> (&'static str, Vec<Op>) {
    let (data, hole) = (true, false);
    let mut operations = vec![
        Op::Open(0, s("a/large"), false),
        Op::HandleSeek(0, 0, data),
        Op::HandleSeek(0, 0, hole),
        Op::HandleSeek(0, 99_999, data),
        Op::HandleSeek(0, 100_000, data),
        Op::HandleSeek(0, 100_001, hole),
        Op::Open(1, s("a/small"), false),
        Op::HandleSeek(1, 2, data),
        Op::HandleSeek(1, 2, hole),
        Op::HandleSeek(1, 5, data),
        Op::HandleSeek(1, 5, hole),
        // Made, with holes before, between and behind the data.
        Op::Create(s("n"), 0o600, b("")),
        Op::Open(2, s("n"), true),
        Op::HandleSeek(2, 0, data),
        Op::HandleTruncate(2, 3 << 20),
        Op::HandleSeek(2, 0, data),
        Op::HandleSeek(2, 5, hole),
        Op::HandleWrite(2, 1 << 20, vec![1; 65_536]),
        Op::HandleWrite(2, 2 << 20, vec![2; 65_536]),
        Op::HandleSync(2),
    ];
    let places = [0, (1 << 20) - 1, 1 << 20, (1 << 20) + 65_536, 2 << 20, (2 << 20) + 65_536, 3 << 20];
    for offset in places {
        operations.extend([Op::HandleSeek(2, offset, data), Op::HandleSeek(2, offset, hole)]);
    }
    operations.extend([
        Op::HandleRead(2, (1 << 20) - 10, 20),
        // Copied up, with a hole made in it.
        Op::Open(3, s("a/large"), true),
        Op::HandlePunch(3, 4096, 61_440),
        Op::HandleSync(3),
        Op::HandleSeek(3, 0, hole),
        Op::HandleSeek(3, 5000, data),
        Op::HandleSeek(3, 70_000, hole),
        Op::HandleSeek(0, 0, data),
        Op::HandleStat(3),
    ]);
    ("holes are found", operations)
}

fn links() -> (&'static str, Vec<Op>) {
    let mut operations = vec![
        // Of what was not changed, as many as the tree says.
        Op::Links(s("a/large")),
        Op::Links(s("a/small")),
        Op::Links(s("a/link")),
        Op::Create(s("n"), 0o600, b("1")),
        Op::Open(0, s("n"), true),
        Op::Links(s("n")),
        Op::Link(s("n"), s("a/n")),
        Op::Link(s("a/n"), s("b/sub/n")),
        Op::Links(s("b/sub/n")),
        Op::HandleLinks(0),
        Op::Unlink(s("n")),
        Op::Links(s("a/n")),
        Op::Rename(s("a/n"), s("c/small")),
        Op::Links(s("c/small")),
        Op::Rename(s("b/sub/n"), s("c/small")),
        Op::Links(s("c/small")),
        // Both are one file: nothing happens (rename(2)).
        Op::Links(s("b/sub/n")),
        Op::Unlink(s("b/sub/n")),
        Op::Create(s("over"), 0o600, b("2")),
        Op::Rename(s("over"), s("c/small")),
        Op::HandleLinks(0),
        Op::Links(s("c/small")),
        Op::HandleRead(0, 0, 10),
        Op::Symlink(s("x"), s("l")),
        Op::Link(s("l"), s("m")),
        Op::Links(s("l")),
        Op::Fifo(s("p")),
        Op::Link(s("p"), s("q")),
        Op::Unlink(s("p")),
        Op::Links(s("q")),
    ];
    // What was changed is counted like what is new.
    operations.extend([
        Op::Append(s("a/large"), b("x")),
        Op::Links(s("a/large")),
        Op::Link(s("a/large"), s("again")),
        Op::Links(s("a/large")),
        Op::Unlink(s("a/large")),
        Op::Links(s("again")),
        Op::Chmod(s("b/small"), 0o600),
        Op::Links(s("b/small")),
        Op::Link(s("b/small"), s("b/smaller")),
        Op::Links(s("b/small")),
    ]);
    ("names are counted", operations)
}

fn synced() -> (&'static str, Vec<Op>) {
    let operations = vec![
        Op::SyncDirectory(s("")),
        Op::SyncDirectory(s("a/sub")),
        Op::Create(s("a/sub/n"), 0o600, b("1")),
        Op::SyncDirectory(s("a/sub")),
        Op::Mkdir(s("d"), 0o700),
        Op::SyncDirectory(s("d")),
        Op::SyncDirectory(s("a/small")),
        Op::Statfs(s("")),
        Op::Statfs(s("a/sub")),
        Op::Statfs(s("a/large")),
        Op::Statfs(s("a/sub/n")),
        Op::Statfs(s("none")),
    ];
    ("directories are synced, and the room of the disk is told", operations)
}
