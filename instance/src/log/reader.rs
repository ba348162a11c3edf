//! Reading a log, and following it.

use std::fs::{self, File, Metadata};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use kiln_contract::{LogLine, LogQuery};
use rustix::event::{PollFd, PollFlags, poll};

use super::watch::watch;
use super::{FILES, decode, rotated};
use crate::process::timespec;

/// How long a file that has grown may go unseen where the kernel tells nothing (inotify watches used up).
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// Gives the lines of the log at `path` that `query` asks for. With `follow`, goes on until `ended` says that nobody
/// writes any more: it gives a handle that becomes readable then, or `None` if that has happened.
pub(crate) fn read(
    path: &Path,
    query: &LogQuery,
    mut ended: impl FnMut() -> Option<OwnedFd>,
    each: &mut dyn FnMut(LogLine) -> ControlFlow<()>,
) -> io::Result<()> {
    // Before anything is read, so that nothing is missed between the last read and the first wait.
    let watch = if query.follow { watch(path) } else { None };
    let mut files = open_all(path)?;
    if let Some(tail) = query.tail {
        seek_to_tail(&mut files, tail)?;
    }
    let mut give = |line: LogLine| {
        if query.until.is_some_and(|until| line.time >= until) {
            return ControlFlow::Break(());
        }
        if query.since.is_some_and(|since| line.time < since) {
            return ControlFlow::Continue(());
        }
        each(line)
    };
    let mut newest = None;
    for file in files {
        let mut lines = Lines::of(file);
        if lines.drain(&mut give)?.is_break() {
            return Ok(());
        }
        newest = Some(lines);
    }
    if !query.follow {
        return Ok(());
    }
    loop {
        // Asked before the last look at the file: what was written before the end is given.
        let writer = ended();
        if catch_up(path, &mut newest, &mut give)?.is_break() {
            return Ok(());
        }
        let Some(writer) = writer else { return Ok(()) };
        wait(&writer, watch.as_ref())?;
    }
}

/// Reads what was added, in the file that is open and in those that took its place.
fn catch_up(
    path: &Path,
    newest: &mut Option<Lines>,
    give: &mut dyn FnMut(LogLine) -> ControlFlow<()>,
) -> io::Result<ControlFlow<()>> {
    let Some(current) = newest else {
        for file in open_all(path)? {
            let lines = newest.insert(Lines::of(file));
            if lines.drain(give)?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        return Ok(ControlFlow::Continue(()));
    };
    // Listed before the open file is read to its end: it can only become complete, not longer, after it was rotated.
    let files = open_all(path)?;
    if current.drain(give)?.is_break() {
        return Ok(ControlFlow::Break(()));
    }
    let at = files.iter().position(|file| same(file, current.reader.get_ref()));
    // One that is gone altogether was overtaken by more than three rotations: go on with the oldest that is left.
    for file in files.into_iter().skip(at.map_or(0, |at| at + 1)) {
        let lines = newest.insert(Lines::of(file));
        if lines.drain(give)?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    Ok(ControlFlow::Continue(()))
}

fn same(a: &File, b: &File) -> bool {
    match (a.metadata(), b.metadata()) {
        (Ok(a), Ok(b)) => identity(&a) == identity(&b),
        _ => false,
    }
}

/// All files of a log, oldest first, as they were at one moment.
///
/// A rotation meanwhile can make one be opened twice, or be missed. They are looked at again in the other order: as long
/// as the oldest keeps its name, none can leave the name before it, so that what each name has at both looks it had all
/// the time between.
fn open_all(path: &Path) -> io::Result<Vec<File>> {
    loop {
        let mut files = Vec::new();
        for n in (0..FILES).rev() {
            files.push(if_there(File::open(rotated(path, n)))?);
        }
        let mut unchanged = true;
        for (n, file) in (0..FILES).zip(files.iter().rev()) {
            let now = if_there(fs::metadata(rotated(path, n)))?;
            let opened = file.as_ref().map(File::metadata).transpose()?;
            unchanged &= now.as_ref().map(identity) == opened.as_ref().map(identity);
        }
        if unchanged {
            return Ok(files.into_iter().flatten().collect());
        }
    }
}

fn if_there<T>(found: io::Result<T>) -> io::Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// Moves the files forward so that only the last `count` lines are left to be read.
fn seek_to_tail(files: &mut [File], count: usize) -> io::Result<()> {
    let mut wanted = count;
    for file in files.iter_mut().rev() {
        let mut end = file.seek(SeekFrom::End(0))?;
        if wanted == 0 {
            continue;
        }
        let mut start = 0;
        let mut block = vec![0; 64 << 10];
        // The newline at the very end closes the last line; it does not separate it from another.
        let mut at_end = true;
        'blocks: while end > 0 {
            let size = end.min(block.len() as u64);
            end -= size;
            file.seek(SeekFrom::Start(end))?;
            let block = &mut block[..size as usize];
            file.read_exact(block)?;
            for (index, byte) in block.iter().enumerate().rev() {
                if *byte == b'\n' && !std::mem::take(&mut at_end) {
                    wanted -= 1;
                    if wanted == 0 {
                        start = end + index as u64 + 1;
                        break 'blocks;
                    }
                }
                at_end = false;
            }
        }
        if wanted > 0 && file.metadata()?.len() > 0 {
            // The first line of a file has no newline before it.
            wanted -= 1;
        }
        file.seek(SeekFrom::Start(start))?;
    }
    Ok(())
}

/// The lines of one file that grows.
#[derive(Debug)]
struct Lines {
    reader: BufReader<File>,
    line: Vec<u8>,
}

impl Lines {
    fn of(file: File) -> Self {
        Self { reader: BufReader::with_capacity(64 << 10, file), line: Vec::new() }
    }

    /// Gives all whole lines that are there now; half a line is kept until its rest comes.
    fn drain(&mut self, give: &mut dyn FnMut(LogLine) -> ControlFlow<()>) -> io::Result<ControlFlow<()>> {
        loop {
            self.reader.read_until(b'\n', &mut self.line)?;
            if !self.line.ends_with(b"\n") {
                return Ok(ControlFlow::Continue(()));
            }
            let line = decode(&self.line);
            self.line.clear();
            if let Some(line) = line
                && give(line).is_break()
            {
                return Ok(ControlFlow::Break(()));
            }
        }
    }
}

/// Waits until something may have been written, or the writer has ended.
fn wait(writer: &OwnedFd, watch: Option<&OwnedFd>) -> io::Result<()> {
    let mut handles = vec![PollFd::new(writer, PollFlags::IN)];
    handles.extend(watch.map(|watch| PollFd::new(watch, PollFlags::IN)));
    let limit = watch.is_none().then(|| timespec(LOOK_AGAIN));
    match poll(&mut handles, limit.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    if let Some(watch) = watch {
        let mut events = [0; 4096];
        while rustix::io::read(watch, &mut events).is_ok_and(|read| read > 0) {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::LogWriter;
    use super::*;
    use kiln_contract::LogStream;

    fn collect(path: &Path, query: &LogQuery) -> Vec<String> {
        let mut out = Vec::new();
        read(path, query, || None, &mut |line| {
            out.push(String::from_utf8_lossy(&line.bytes).into_owned());
            ControlFlow::Continue(())
        })
        .unwrap();
        out
    }

    fn numbers(range: std::ops::Range<usize>) -> Vec<String> {
        range.map(|n| format!("{n}\n")).collect()
    }

    #[test]
    fn tail_gives_the_last_lines_across_rotations() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.jsonl");
        // About 80 bytes a line: five lines a file, three files.
        let mut writer = LogWriter::with_limit(&path, 450).unwrap();
        for line in numbers(0..30) {
            writer.write(LogStream::Stdout, line.as_bytes()).unwrap();
        }
        let kept = collect(&path, &LogQuery::default());
        assert!((10..30).contains(&kept.len()), "{kept:?}");
        assert_eq!(kept, numbers(30 - kept.len()..30), "the newest are kept, in order");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3);
        for tail in [0, 1, 4, 5, 6, 9, kept.len(), 100] {
            let query = LogQuery { tail: Some(tail), ..LogQuery::default() };
            let wanted = tail.min(kept.len());
            assert_eq!(collect(&path, &query), numbers(30 - wanted..30), "{tail}");
        }
    }

    #[test]
    fn since_and_until_cut_by_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.jsonl");
        let mut writer = LogWriter::open(&path).unwrap();
        let mut between = Vec::new();
        for line in numbers(0..3) {
            writer.write(LogStream::Stdout, line.as_bytes()).unwrap();
            std::thread::sleep(Duration::from_millis(2));
            between.push(jiff::Timestamp::now());
        }
        let table =
            [(None, Some(0), 0..1), (Some(0), None, 1..3), (Some(0), Some(1), 1..2), (Some(2), None, 0..0)];
        for (since, until, range) in table {
            let at = |index: Option<usize>| index.map(|index| between[index]);
            let query = LogQuery { since: at(since), until: at(until), ..LogQuery::default() };
            assert_eq!(collect(&path, &query), numbers(range));
        }
    }

    #[test]
    fn long_lines_are_cut_and_unfinished_ones_come_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.jsonl");
        let mut writer = LogWriter::open(&path).unwrap();
        writer.write(LogStream::Stdout, &vec![b'x'; 40_000]).unwrap();
        writer.write(LogStream::Stderr, b"err\n").unwrap();
        writer.write(LogStream::Stdout, b"y\nprompt> ").unwrap();
        let lengths =
            |path: &Path| collect(path, &LogQuery::default()).iter().map(String::len).collect::<Vec<_>>();
        assert_eq!(lengths(&path), [16_384, 16_384, 4, 7234]);
        writer.finish().unwrap();
        assert_eq!(collect(&path, &LogQuery::default()).last().unwrap(), "prompt> ");
    }

    #[test]
    fn a_torn_line_of_a_killed_writer_costs_only_itself() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.jsonl");
        LogWriter::open(&path).unwrap().write(LogStream::Stdout, b"whole\n").unwrap();
        let mut torn = std::fs::read(&path).unwrap();
        torn.extend_from_slice(br#"{"time":"2026-"#);
        std::fs::write(&path, torn).unwrap();
        LogWriter::open(&path).unwrap().write(LogStream::Stdout, b"next\n").unwrap();
        assert_eq!(collect(&path, &LogQuery::default()), ["whole\n", "next\n"]);
    }

    #[test]
    fn files_are_in_order_and_none_is_missed_while_they_are_rotated() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.jsonl");
        // Every line is a file.
        let mut writer = LogWriter::with_limit(&path, 1).unwrap();
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for line in numbers(0..10_000) {
                    writer.write(LogStream::Stdout, line.as_bytes()).unwrap();
                }
                done.store(true, std::sync::atomic::Ordering::SeqCst);
            });
            let mut looks = 0;
            while !done.load(std::sync::atomic::Ordering::SeqCst) {
                let mut seen = Vec::new();
                for file in open_all(&path).unwrap() {
                    let _ = Lines::of(file).drain(&mut |line| {
                        seen.push(String::from_utf8(line.bytes).unwrap().trim_end().parse::<u32>().unwrap());
                        ControlFlow::Continue(())
                    });
                }
                assert!(seen.windows(2).all(|pair| pair[0] + 1 == pair[1]), "{seen:?}");
                looks += 1;
            }
            assert!(looks > 10, "{looks}");
        });
    }

    #[test]
    fn following_gives_every_line_through_rotations_until_the_writer_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.jsonl");
        // Large enough that the reader is never overtaken by three rotations while this test runs.
        let mut writer = LogWriter::with_limit(&path, 40_000).unwrap();
        writer.write(LogStream::Stdout, b"0\n").unwrap();
        let (alive, dead) = rustix::pipe::pipe().unwrap();
        let alive = std::sync::Mutex::new(Some(alive));
        let given = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut out = Vec::new();
                let query = LogQuery { follow: true, ..LogQuery::default() };
                let ended = || {
                    let alive = alive.lock().unwrap();
                    let handle = alive.as_ref()?.try_clone().unwrap();
                    let mut look = [PollFd::new(&handle, PollFlags::IN)];
                    let gone = poll(&mut look, Some(&timespec(Duration::ZERO))).unwrap() > 0;
                    (!gone).then_some(handle)
                };
                read(&path, &query, ended, &mut |line| {
                    out.push(String::from_utf8(line.bytes).unwrap());
                    given.store(out.len(), std::sync::atomic::Ordering::SeqCst);
                    ControlFlow::Continue(())
                })
                .unwrap();
                out
            });
            for (n, line) in numbers(0..2000).iter().enumerate().skip(1) {
                writer.write(LogStream::Stdout, line.as_bytes()).unwrap();
                // Never further ahead than two files.
                while n > given.load(std::sync::atomic::Ordering::SeqCst) + 800 {
                    std::thread::yield_now();
                }
            }
            drop(dead);
            assert_eq!(reader.join().unwrap(), numbers(0..2000));
        });
    }
}
