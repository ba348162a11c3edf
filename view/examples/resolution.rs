//! How long the router takes to find the view of a caller that it has seen before: prints nanoseconds, the median of many
//! rounds, for a process eight generations below the one to which the view was shown.

use std::hint::black_box;
use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::time::Instant;

use kiln_view::router::{Host, Processes};

const ROUNDS: usize = 201;
const CALLS: u32 = 2000;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Each shell starts the next; the last one tells its number and waits for the end of its input.
    let script = r#"[ "$1" -gt 0 ] && { sh -c "$0" "$0" $(($1 - 1)); exit; }; echo $$; read x"#;
    let mut child = Command::new("sh")
        .args(["-c", script, script, "7"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().ok_or("no output")?).read_line(&mut line)?;
    let caller: u32 = line.trim().parse()?;

    let processes = Processes::new(Host);
    processes.show(std::process::id(), 1)?;
    let mut samples = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        for _ in 0..CALLS {
            if black_box(processes.view_of(black_box(caller))?) != Some(1) {
                return Err("the caller is not in the view".into());
            }
        }
        samples.push(begun.elapsed() / CALLS);
    }
    samples.sort_unstable();
    drop(child.stdin.take());
    child.wait()?;
    let mut out = std::io::stdout();
    std::io::Write::write_all(&mut out, format!("{}\n", samples[ROUNDS / 2].as_nanos()).as_bytes())?;
    Ok(())
}
