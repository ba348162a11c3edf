//! The measures, each with its goal.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::disk::directory;
use super::peers::{Bundle, Conmon, podman_pull, skopeo_umoci_pull};
use super::sampling::{at_once, median, medians, quietly, rounds, settle, timed};
use super::table::{Row, seconds};
use crate::kiln::Kiln;
use crate::shell::{Outcome, capture};

/// What is measured with.
pub(crate) struct Images {
    /// References in the registry.
    pub(crate) busybox: String,
    pub(crate) debian: String,
    pub(crate) similar: String,
    /// The trees that they were made of.
    pub(crate) busybox_root: PathBuf,
    pub(crate) similar_root: PathBuf,
}

pub(crate) type Measure = fn(&Path, &Images) -> Outcome<Vec<Row>>;

/// Those of containers, in the order of the table, as all are.
pub(crate) const OF_CONTAINERS: &[Measure] = &[start, pull, shared_files, commit, memory, at_once_fifty];

/// Those of machines.
pub(crate) const OF_MACHINES: &[Measure] = &[
    super::machine_life::starts,
    super::machine_life::bare,
    super::machine_network::usernet,
    super::machine_network::shares,
];

/// Those of views.
pub(crate) const OF_VIEWS: &[Measure] = &[
    super::views::starts,
    super::views::walks,
    super::views::data,
    super::views::commits,
    super::views_on_demand::first_byte,
    super::router::resolution,
];

/// Those in which the filesystem weighs most.
pub(crate) const OF_FILESYSTEM: &[Measure] = &[start, pull, commit, at_once_fifty];

pub(super) fn ratio_row(measure: &str, kiln: f64, peers: &[(&str, f64)], goal: f64) -> Row {
    let best = peers.iter().map(|(_, value)| *value).fold(f64::INFINITY, f64::min);
    let ratio = kiln / best;
    let shown: Vec<String> =
        peers.iter().map(|(name, value)| format!("{name} {}", seconds(*value))).collect();
    Row {
        measure: measure.to_owned(),
        kiln: seconds(kiln),
        peers: shown.join(", "),
        result: format!("{ratio:.2} ×"),
        goal: format!("≤ {goal} ×"),
        met: ratio <= goal,
    }
}

fn with_images(program: &Path, images: &[&String]) -> Outcome<Kiln> {
    let kiln = Kiln::below(&directory(), program)?;
    for image in images {
        kiln.output(["image", "pull", "--quiet", image])?;
    }
    Ok(kiln)
}

fn start(program: &Path, images: &Images) -> Outcome<Vec<Row>> {
    let kiln = with_images(program, &[&images.busybox, &images.debian])?;
    settle();
    let bundle = Bundle::new(&images.busybox_root, &["true"])?;
    let run = |image: &str| {
        timed(|| quietly(&mut kiln.command(["run", "--rm", "--network", "none", image, "true"])))
    };
    let [small, large, runc] = medians(
        60,
        [
            Box::new(|| run(&images.busybox)),
            Box::new(|| run(&images.debian)),
            Box::new(|| bundle.run("runc")),
        ],
    )?;
    let row =
        ratio_row("`kiln run --rm --network none` of a warm image, `true`", small, &[("runc", runc)], 0.5);
    Ok(vec![
        row,
        ratio_row("the same, Debian image against busybox image", large, &[("busybox image", small)], 1.1),
    ])
}

fn pull(program: &Path, images: &Images) -> Outcome<Vec<Row>> {
    let image = images.debian.as_str();
    let [kiln, podman, skopeo] = medians(
        3,
        [
            Box::new(|| {
                settle();
                let kiln = Kiln::below(&directory(), program)?;
                timed(|| quietly(&mut kiln.command(["image", "pull", "--quiet", image])))
            }),
            Box::new(|| {
                settle();
                podman_pull(image)
            }),
            Box::new(|| {
                settle();
                skopeo_umoci_pull(image)
            }),
        ],
    )?;
    let peers = [("podman pull", podman), ("skopeo copy + umoci unpack", skopeo)];
    Ok(vec![ratio_row("pull of the Debian image, ready to run", kiln, &peers, 0.4)])
}

/// A copy of `root` in which every twentieth file differs, so that 95 % of the files are shared but no layer is. Kept
/// beside it.
pub(crate) fn similar_root(root: &Path) -> Outcome<PathBuf> {
    let name = root.file_name().unwrap_or_default().to_string_lossy();
    let target = root.with_file_name(format!("{name}-similar"));
    if target.exists() {
        return Ok(target);
    }
    let staging = root.with_file_name(format!(".{name}-similar"));
    let _ = fs::remove_dir_all(&staging);
    capture(Command::new("cp").args(["--archive", "--reflink=auto"]).arg(root).arg(&staging))?;
    let files = capture(Command::new("find").arg(&staging).args(["-type", "f", "-links", "1"]))?;
    let mut files: Vec<&str> = files.lines().collect();
    files.sort_unstable();
    for path in files.iter().step_by(20) {
        let problem = |error: std::io::Error| format!("cannot change {path}: {error}");
        let mut bytes = fs::read(path).map_err(problem)?;
        bytes.extend_from_slice(b"\nchanged\n");
        fs::write(path, bytes).map_err(problem)?;
    }
    fs::rename(&staging, &target).map_err(|error| format!("cannot rename {}: {error}", staging.display()))?;
    Ok(target)
}

fn disk_usage(path: &Path) -> Outcome<f64> {
    let shown = capture(Command::new("du").args(["--summarize", "--block-size=1"]).arg(path))?;
    let bytes = shown.split_whitespace().next().and_then(|bytes| bytes.parse::<u64>().ok());
    bytes.map(|bytes| bytes as f64).ok_or_else(|| format!("du said {shown:?}"))
}

fn shared_files(program: &Path, images: &Images) -> Outcome<Vec<Row>> {
    let kiln = with_images(program, &[&images.debian])?;
    let store = kiln.home().join("store");
    settle();
    let before = disk_usage(&store)?;
    kiln.output(["image", "pull", "--quiet", &images.similar])?;
    settle();
    let added = disk_usage(&store)? - before;
    let size = disk_usage(&images.similar_root)?;
    let share = added / size * 100.0;
    Ok(vec![Row {
        measure: "pull of a second image that shares 95 % of its files but no layer: growth of the store"
            .to_owned(),
        kiln: format!("{:.1} MiB", added / 1048576.0),
        peers: format!("its size: {:.0} MiB", size / 1048576.0),
        result: format!("{share:.1} %"),
        goal: "≤ 7 %".to_owned(),
        met: share <= 7.0,
    }])
}

fn commit(program: &Path, images: &Images) -> Outcome<Vec<Row>> {
    let kiln = with_images(program, &[&images.busybox, &images.debian])?;
    for (name, image) in [("small", &images.busybox), ("large", &images.debian)] {
        kiln.output(["run", "--detach", "--network", "none", "--name", name, image, "sleep", "1000"])?;
    }
    let mut round = 0;
    let mut once = |name: &str| {
        round += 1;
        kiln.output(["exec", name, "sh", "-c", &format!("echo {round} > /etc/changed")])?;
        let tag = format!("bench/{name}:{round}");
        timed(|| quietly(&mut kiln.command(["commit", name, &tag])))
    };
    let mut samples = [Vec::new(), Vec::new()];
    for _ in 0..rounds(15) {
        samples[0].push(once("small")?);
        samples[1].push(once("large")?);
    }
    let [small, large] = samples.map(|samples| median(&samples));
    let growth = large / small;
    let mut rows = vec![Row {
        measure: "commit of one changed file on the Debian image".to_owned(),
        kiln: seconds(large),
        peers: format!("on the busybox image {}", seconds(small)),
        result: seconds(large),
        goal: "≤ 40 ms".to_owned(),
        met: large <= 0.040,
    }];
    rows.push(Row {
        measure: "the same, Debian image against busybox image".to_owned(),
        result: format!("{growth:.2} ×"),
        goal: "≤ 1.25 × (does not grow with the image)".to_owned(),
        met: growth <= 1.25,
        kiln: seconds(large),
        peers: seconds(small),
    });
    Ok(rows)
}

/// Proportional set size of a process, in KiB.
fn pss(pid: u32) -> Outcome<f64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path).map_err(|error| format!("cannot read {path}: {error}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok())
        .ok_or_else(|| format!("no Pss in {path}"))
}

/// The process whose command line holds `supervise` and `id`.
fn supervisor_of(id: &str) -> Outcome<u32> {
    let processes = fs::read_dir("/proc").map_err(|error| format!("cannot read /proc: {error}"))?;
    for process in processes.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let line = fs::read(process.path().join("cmdline")).unwrap_or_default();
        let words: Vec<_> = line.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
        if words.iter().any(|word| word == "supervise") && words.iter().any(|word| word.starts_with(id)) {
            return Ok(pid);
        }
    }
    Err(format!("no process supervises {id}"))
}

fn memory(program: &Path, images: &Images) -> Outcome<Vec<Row>> {
    const COUNT: usize = 5;
    let kiln = with_images(program, &[&images.busybox])?;
    let mut supervisors = Vec::new();
    let mut owners = Vec::new();
    for number in 0..COUNT {
        let id = kiln.output(["run", "--detach", "--network", "none", &images.busybox, "sleep", "1000"])?;
        supervisors.push(supervisor_of(&id)?);
        owners.push(Conmon::start(&images.busybox_root, number)?);
    }
    // All of them run: each shares its program's pages with as many of its kind.
    let ours = supervisors.iter().map(|pid| pss(*pid)).collect::<Outcome<Vec<_>>>()?;
    let theirs = owners.iter().map(|owner| pss(owner.pid)).collect::<Outcome<Vec<_>>>()?;
    let (ours, theirs) = (median(&ours) / 1024.0, median(&theirs) / 1024.0);
    Ok(vec![Row {
        measure: format!("memory (PSS) of a detached container's supervisor, {COUNT} running"),
        kiln: format!("{ours:.2} MiB"),
        peers: format!("conmon {theirs:.2} MiB"),
        result: format!("{ours:.2} MiB"),
        goal: "≤ 6 MiB".to_owned(),
        met: ours <= 6.0,
    }])
}

fn at_once_fifty(program: &Path, images: &Images) -> Outcome<Vec<Row>> {
    const COUNT: usize = 50;
    let kiln = with_images(program, &[&images.busybox])?;
    let bundle = Bundle::new(&images.busybox_root, &["true"])?;
    let image = images.busybox.as_str();
    let [ours, runc] = medians(
        5,
        [
            Box::new(|| {
                let run = |_| kiln.command(["run", "--rm", "--network", "none", image, "true"]);
                at_once((0..COUNT).map(run).collect())
            }),
            Box::new(|| bundle.run_many("runc", COUNT)),
        ],
    )?;
    Ok(vec![ratio_row("50 containers started in parallel", ours, &[("runc", runc)], 0.8)])
}
