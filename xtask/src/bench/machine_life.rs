//! What it takes for a machine to be there: starts, forks, commands, boots, memory.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use super::bare::{Asked, Bare, Guest};
use super::docker::Docker;
use super::machine_network::with_machines;
use super::measures::{Images, ratio_row};
use super::sampling::{median, medians, quietly, settle, timed};
use super::table::{Row, seconds};
use crate::kiln::Kiln;
use crate::shell::{Outcome, capture};

/// Machines of which the memory is measured.
const CLONES: usize = 20;
/// Starts one after the other.
const ROW: usize = 20;

/// Starts, beside Docker's containers; commands in what runs, beside Docker's.
pub(super) fn starts(program: &Path, images: &Images) -> Outcome<Vec<Row>> {
    let kiln = with_machines(program, images)?;
    kiln.output(["image", "pull", "--quiet", &images.debian])?;
    let docker = Docker::start(&images.busybox_root)?;
    let run = |image: &str| timed(|| quietly(&mut kiln.command(["run", "--vm", "--rm", image, "true"])));
    // Templates and image disks are made here.
    run(&images.busybox)?;
    run(&images.debian)?;
    settle();
    let [small, large, peer] = medians(
        20,
        [Box::new(|| run(&images.busybox)), Box::new(|| run(&images.debian)), Box::new(|| docker.run())],
    )?;
    // Beside Docker again: what makes the next machine ready must not run meanwhile.
    let keeping = || {
        let mut command = kiln.command(["run", "--vm", "--rm", &images.busybox, "true"]);
        command.env("KILN_SPARE", "on");
        timed(|| quietly(&mut command))
    };
    keeping()?;
    let [spare, beside] = medians(
        20,
        [
            Box::new(|| {
                wait_for_spare(&kiln)?;
                keeping()
            }),
            Box::new(|| {
                wait_for_spare(&kiln)?;
                docker.run()
            }),
        ],
    )?;
    // No interleaving here: meanwhile the next machine would be made ready.
    let row = (0..ROW).map(|_| keeping()).collect::<Outcome<Vec<_>>>()?;
    wait_for_spare(&kiln)?;
    let peer_row = (0..ROW).map(|_| docker.run()).collect::<Outcome<Vec<_>>>()?;
    kiln.output(["template", "prune"])?;
    kiln.output(["run", "--vm", "-d", "--name", "dev", &images.busybox, "sleep", "3600"])?;
    docker.sleeper("dev")?;
    let [exec, peer_exec] = medians(
        30,
        [
            Box::new(|| timed(|| quietly(&mut kiln.command(["exec", "dev", "true"])))),
            Box::new(|| docker.exec("dev")),
        ],
    )?;
    Ok(vec![
        ratio_row(
            "`kiln run --vm --rm IMAGE true`, warm, when a spare machine waits",
            spare,
            &[("docker run --rm", beside)],
            0.8,
        ),
        ratio_row(
            "the same, one start right after the other",
            median(&row),
            &[("docker run --rm", median(&peer_row))],
            0.8,
        ),
        ratio_row("the same, without a spare machine", small, &[("docker run --rm", peer)], 0.8),
        ratio_row("the same, Debian image against busybox image", large, &[("busybox image", small)], 1.15),
        ratio_row("`kiln exec` of `true` in a machine", exec, &[("docker exec", peer_exec)], 0.3),
    ])
}

/// Waits until a machine is ready for the next start, if one is being made; with KVM none is.
fn wait_for_spare(kiln: &Kiln) -> Outcome {
    let begun = Instant::now();
    let mut is_seen = false;
    loop {
        let listed = kiln.output(["template", "ls", "--format", "json"])?;
        let listed: serde_json::Value = serde_json::from_str(&listed).map_err(|error| error.to_string())?;
        let states = || listed.as_array().into_iter().flatten().filter_map(|row| row["spare"].as_str());
        is_seen |= states().next().is_some();
        let patience = Duration::from_secs(if is_seen { 30 } else { 1 });
        if states().any(|state| state == "ready") || begun.elapsed() > patience {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Forks, boots and memory, beside a hypervisor and nothing else.
pub(super) fn bare(program: &Path, images: &Images) -> Outcome<Vec<Row>> {
    let kiln = with_machines(program, images)?;
    let bare = Bare::new()?;
    let [boot, bare_boot] = medians(
        4,
        [
            Box::new(|| {
                kiln.output(["template", "prune"])?;
                kiln.output(["run", "--vm", "--rm", "--memory", "256m", &images.busybox, "true"])?;
                boot_of(&kiln)
            }),
            Box::new(|| bare.boot()),
        ],
    )?;
    let mut pauses = Vec::new();
    kiln.output([
        "run",
        "--vm",
        "-d",
        "--name",
        "dev",
        "--memory",
        "256m",
        &images.busybox,
        "sleep",
        "3600",
    ])?;
    let [fork, bare_clone, bare_command] = medians(
        10,
        [
            Box::new(|| {
                let took = timed(|| {
                    let said = said_of(kiln.command(["--verbose", "fork", "dev", "copy"]))?;
                    pauses.push(pause_in(&said)?);
                    quietly(&mut kiln.command(["exec", "copy", "true"]))
                });
                kiln.output(["rm", "--force", "copy"])?;
                took
            }),
            Box::new(|| bare.clone("clone", Asked::Answer).map(|(_, took)| took)),
            Box::new(|| bare.clone("clone", Asked::Command).map(|(_, took)| took)),
        ],
    )?;
    let pause = median(&pauses);
    let bare_memory = memory_of_clones(&bare, Asked::Answer)?;
    let bare_command_memory = memory_of_clones(&bare, Asked::Command)?;
    let memory = memory_of_machines(&kiln, images)?;
    let ratio = memory / bare_memory;
    let mebibytes = |bytes: f64| format!("{:.1} MiB", bytes / f64::from(1 << 20));
    Ok(vec![
        ratio_row(
            "cold boot until the guest says hello",
            boot,
            &[("bare QEMU, a shell for an init", bare_boot)],
            1.15,
        ),
        ratio_row(
            "live fork until a command in the copy has run",
            fork,
            &[
                ("restore of a bare QEMU until it answers", bare_clone),
                ("until a command in it has run", bare_command),
            ],
            2.0,
        ),
        Row {
            measure: "pause of the original in a live fork".to_owned(),
            kiln: seconds(pause),
            peers: String::new(),
            result: seconds(pause),
            goal: "≤ 30 ms".to_owned(),
            met: pause <= 0.03,
        },
        Row {
            measure: format!("memory of each of {CLONES} machines of 256 MiB (PSS of the hypervisor)"),
            kiln: mebibytes(memory),
            peers: format!(
                "clones of a bare QEMU {}, that have run a command {}",
                mebibytes(bare_memory),
                mebibytes(bare_command_memory)
            ),
            result: format!("{ratio:.2} ×"),
            goal: "≤ 1.1 ×".to_owned(),
            met: ratio <= 1.1,
        },
    ])
}

/// How long the template that was made last took to boot, in seconds.
fn boot_of(kiln: &Kiln) -> Outcome<f64> {
    let listed = kiln.output(["template", "ls", "--format", "json"])?;
    let listed: serde_json::Value =
        serde_json::from_str(&listed).map_err(|error| format!("templates cannot be read: {error}"))?;
    let millis = listed[0]["boot_millis"].as_f64().ok_or("there is no template")?;
    Ok(millis / 1e3)
}

/// What a command says on standard error.
fn said_of(mut command: Command) -> Outcome<String> {
    let output = command.output().map_err(|error| format!("cannot run {command:?}: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(said) } else { Err(format!("{command:?} failed: {said}")) }
}

/// How long a fork's original did not run, in seconds.
fn pause_in(said: &str) -> Outcome<f64> {
    let (_, rest) = said.split_once("paused_microseconds=").ok_or("a fork does not say how long it took")?;
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse::<f64>().map(|micros| micros / 1e6).map_err(|error| format!("{said}: {error}"))
}

/// The proportional set size of each process, in bytes: the mean.
fn shared_out(pids: &[u32]) -> Outcome<f64> {
    let mut sum = 0.0;
    for pid in pids {
        let path = format!("/proc/{pid}/smaps_rollup");
        let text = std::fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
        let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).ok_or("no PSS")?;
        let kib: f64 =
            line.trim().trim_end_matches(" kB").parse().map_err(|error| format!("{line}: {error}"))?;
        sum += kib * 1024.0;
    }
    Ok(sum / pids.len() as f64)
}

fn memory_of_clones(bare: &Bare, asked: Asked) -> Outcome<f64> {
    let mut clones = Vec::new();
    for number in 0..CLONES {
        clones.push(bare.clone(&format!("clone-{number}"), asked)?.0);
    }
    shared_out(&clones.iter().map(Guest::pid).collect::<Vec<_>>())
}

fn memory_of_machines(kiln: &Kiln, images: &Images) -> Outcome<f64> {
    let mut pids = Vec::new();
    for number in 0..CLONES {
        let name = format!("many-{number}");
        kiln.output([
            "run",
            "--vm",
            "-d",
            "--name",
            &name,
            "--memory",
            "256m",
            &images.busybox,
            "sleep",
            "3600",
        ])?;
        let monitor = kiln.output(["inspect", "--format", "json", &name])?;
        let inspected: serde_json::Value =
            serde_json::from_str(&monitor).map_err(|error| format!("{name} cannot be read: {error}"))?;
        let monitor = inspected[0]["process"]["pid"].as_u64().ok_or("a machine has no process")?;
        let children = capture(Command::new("cat").arg(format!("/proc/{monitor}/task/{monitor}/children")))?;
        let hypervisor = children.split_whitespace().next().ok_or("a machine has no hypervisor")?;
        pids.push(hypervisor.parse().map_err(|error| format!("{children}: {error}"))?);
    }
    let memory = shared_out(&pids)?;
    for number in 0..CLONES {
        kiln.output(["rm", "--force", &format!("many-{number}")])?;
    }
    Ok(memory)
}
