//! What a machine's network and files cost: `usernet` beside QEMU's own user network, 9P beside the link that carries it.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use super::disk::directory;
use super::measures::{Images, ratio_row};
use super::sampling::{medians, quietly, settle, timed};
use super::slirp::Slirp;
use super::table::Row;
use crate::kiln::Kiln;
use crate::shell::Outcome;

/// Bytes of one sample.
const BYTES: usize = 64 << 20;
const MEBIBYTES: usize = BYTES >> 20;
const ROUNDS: usize = 5;
/// The guest's port that gives [`BYTES`] to whoever connects.
pub(super) const PORT: u16 = 8000;
/// For a machine to boot and to serve.
const PATIENCE: Duration = Duration::from_secs(120);

/// What runs in the guest of each contender: it gives bytes at [`PORT`], and takes what `host` gives at `port`, without end.
pub(super) fn script(host: &str, port: u16) -> String {
    let count = BYTES >> 16;
    format!(
        "nc -ll -p {PORT} -e dd if=/dev/zero bs=64k count={count} 2> /dev/null & \
         while :; do nc {host} {port} -e dd of=/dev/null bs=64k 2> /dev/null || sleep 0.2; done"
    )
}

/// Takes all that a guest gives at a port of this host; how long that took, in seconds.
fn downloaded(from: SocketAddr) -> Outcome<f64> {
    let begun = Instant::now();
    let read = || -> std::io::Result<usize> {
        let mut stream = TcpStream::connect(from)?;
        let (mut piece, mut all) = (vec![0; 256 << 10], 0);
        loop {
            match stream.read(&mut piece)? {
                0 => return Ok(all),
                count => all += count,
            }
        }
    };
    match read() {
        Ok(BYTES) => Ok(begun.elapsed().as_secs_f64()),
        Ok(other) => Err(format!("a guest gave {other} bytes and not {BYTES}")),
        Err(error) => Err(format!("cannot take what a guest gives: {error}")),
    }
}

/// Gives a guest that comes to a port of this host all that it takes; how long that took until it had the last byte.
fn given(at: &TcpListener) -> Outcome<f64> {
    let give = || -> std::io::Result<f64> {
        let mut stream = accepted(at)?;
        let begun = Instant::now();
        let piece = vec![7; 256 << 10];
        for _ in 0..BYTES / piece.len() {
            stream.write_all(&piece)?;
        }
        stream.shutdown(Shutdown::Write)?;
        // It closes when it has read all.
        stream.read_to_end(&mut Vec::new())?;
        Ok(begun.elapsed().as_secs_f64())
    };
    give().map_err(|error| format!("cannot give a guest bytes: {error}"))
}

/// The next connection; an error if nobody comes.
fn accepted(at: &TcpListener) -> std::io::Result<TcpStream> {
    let begun = Instant::now();
    loop {
        match at.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) if error.kind() != std::io::ErrorKind::WouldBlock || begun.elapsed() > PATIENCE => {
                return Err(error);
            }
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

fn listener() -> Outcome<(TcpListener, u16)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| {
        listener.set_nonblocking(true)?;
        let port = listener.local_addr()?.port();
        Ok((listener, port))
    });
    listener.map_err(|error| format!("cannot listen on loopback: {error}"))
}

fn until_it_serves(at: SocketAddr) -> Outcome {
    let begun = Instant::now();
    loop {
        match downloaded(at) {
            Ok(_) => return Ok(()),
            Err(problem) if begun.elapsed() > PATIENCE => return Err(problem),
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
        }
    }
}

/// A `kiln` with a kernel and the busybox image.
pub(super) fn with_machines(program: &Path, images: &Images) -> Outcome<Kiln> {
    let package =
        kiln_fixtures::debian_kernel().ok_or("there is no kernel for machines: see the skips above")?;
    let kiln = Kiln::below(&directory(), program)?;
    kiln.output(["image", "pull", "--quiet", &images.busybox])?;
    let package = package.to_str().ok_or("the kernel's package has a name that is not UTF-8")?;
    kiln.output(["kernel", "install", "--from", package])?;
    Ok(kiln)
}

/// `usernet` and QEMU's user network, with the same kernel, processor and memory.
pub(crate) fn usernet(program: &Path, images: &Images) -> Outcome<Vec<Row>> {
    let kiln = with_machines(program, images)?;
    let ((to_kiln, kiln_port), (to_slirp, slirp_port)) = (listener()?, listener()?);
    let rule = format!("host-loopback:{kiln_port}");
    let published = format!("127.0.0.1::{PORT}");
    let words = ["run", "-d", "--vm", "--name", "bench", "--allow", &rule, "-p", &published];
    let command = [&images.busybox, "sh", "-c", &script("192.0.0.1", kiln_port)];
    quietly(&mut kiln.command(words.iter().copied().chain(command)))?;
    let shown = kiln.output(["port", "bench"])?;
    let kiln_at: SocketAddr = shown
        .rsplit(' ')
        .next()
        .and_then(|address| address.trim().parse().ok())
        .ok_or_else(|| format!("`kiln port` says {shown:?}"))?;
    let slirp = Slirp::boot(slirp_port)?;
    until_it_serves(kiln_at)?;
    until_it_serves(slirp.published())?;
    settle();
    let [published, published_peer, outward, outward_peer] = medians(
        ROUNDS,
        [
            Box::new(|| downloaded(kiln_at)),
            Box::new(|| downloaded(slirp.published())),
            Box::new(|| given(&to_kiln)),
            Box::new(|| given(&to_slirp)),
        ],
    )?;
    let peer = "QEMU's user network";
    Ok(vec![
        ratio_row(
            &format!("`usernet`: {MEBIBYTES} MiB from a machine through a published port"),
            published,
            &[(peer, published_peer)],
            1.0,
        ),
        ratio_row(
            &format!("`usernet`: {MEBIBYTES} MiB to a machine that connects outward"),
            outward,
            &[(peer, outward_peer)],
            1.0,
        ),
    ])
}

/// Files of the host's, beside streams of the link with nothing at their ends.
pub(crate) fn shares(program: &Path, images: &Images) -> Outcome<Vec<Row>> {
    /// A rate of 0.7 is a time of this.
    const GOAL: f64 = 1.43;
    /// Of what is copied, in mebibytes.
    const COPIED: usize = 1024;
    let kiln = with_machines(program, images)?;
    let shared = kiln.home().join("shared");
    let fail = |error: std::io::Error| format!("cannot write to {}: {error}", shared.display());
    std::fs::create_dir(&shared).map_err(fail)?;
    std::fs::write(shared.join("file"), vec![7; BYTES]).map_err(fail)?;
    let large = kiln.home().join("large");
    std::fs::write(&large, vec![7; COPIED << 20]).map_err(fail)?;
    let share = format!("{}:/shared", shared.display());
    let words = ["run", "-d", "--vm", "--name", "bench", "-v", &share, &images.busybox, "sleep", "100000"];
    quietly(&mut kiln.command(words))?;
    settle();
    let exec =
        |command: &[&str]| timed(|| quietly(&mut kiln.command(["exec", "bench"].iter().chain(command))));
    let count = |mebibytes: usize| format!("count={mebibytes}");
    let outward = |mebibytes| exec(&["dd", "if=/dev/zero", "bs=1M", &count(mebibytes)]);
    let inward = |file: &Path, mebibytes: usize| {
        timed(|| {
            let take = "dd iflag=fullblock of=/dev/null bs=1M 2>&1";
            let mut command = kiln.command(["exec", "-i", "bench", "sh", "-c", take]);
            let file = std::fs::File::open(file).map_err(fail)?;
            let output = command.stdin(Stdio::from(file)).output().map_err(fail)?;
            let said = String::from_utf8_lossy(&output.stdout);
            if said.starts_with(&format!("{mebibytes}+0 records in")) {
                Ok(())
            } else {
                Err(format!("a machine took only: {said}"))
            }
        })
    };
    let row = |measure: &str, mebibytes: usize, time: f64, link: f64| {
        ratio_row(&format!("{measure}, {mebibytes} MiB"), time, &[("a stream of the link", link)], GOAL)
    };
    let [link_in, link_out, read, write] = medians(
        ROUNDS,
        [
            Box::new(|| inward(&shared.join("file"), MEBIBYTES)),
            Box::new(|| outward(MEBIBYTES)),
            Box::new(|| exec(&["dd", "if=/shared/file", "of=/dev/null", "bs=1M"])),
            Box::new(|| exec(&["dd", "if=/dev/zero", "of=/shared/new", "bs=1M", &count(MEBIBYTES)])),
        ],
    )?;
    let mut rows = vec![
        row("9P, sequential read in a machine", MEBIBYTES, read, link_in),
        row("9P, sequential write in a machine", MEBIBYTES, write, link_out),
    ];
    let copy = |from: &str, to: &str| timed(|| quietly(&mut kiln.command(["cp", from, to])));
    let (there, back) = (large.display().to_string(), kiln.home().join("back").display().to_string());
    let [link_in, link_out, copied_in, copied_out] = medians(
        3,
        [
            Box::new(|| inward(&large, COPIED)),
            Box::new(|| outward(COPIED)),
            Box::new(|| copy(&there, "bench:/copied")),
            Box::new(|| copy("bench:/copied", &back)),
        ],
    )?;
    rows.push(row("`kiln cp` into a machine", COPIED, copied_in, link_in));
    rows.push(row("`kiln cp` out of a machine", COPIED, copied_out, link_out));
    Ok(rows)
}
