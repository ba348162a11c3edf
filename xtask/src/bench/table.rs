//! The table of `docs/benchmarks.md`.

/// One line of it.
pub(crate) struct Row {
    /// What is measured.
    pub(crate) measure: String,
    /// Kiln's own figure.
    pub(crate) kiln: String,
    /// The peers' figures.
    pub(crate) peers: String,
    /// What the goal is about: a ratio to the better peer, or the figure itself.
    pub(crate) result: String,
    /// What it should be at most.
    pub(crate) goal: String,
    /// Whether it is.
    pub(crate) met: bool,
}

impl Row {
    /// As a line of Markdown.
    pub(crate) fn line(&self) -> String {
        let met = if self.met { "yes" } else { "**no**" };
        let Self { measure, kiln, peers, result, goal, .. } = self;
        format!("| {measure} | {kiln} | {peers} | {result} | {goal} | {met} |")
    }
}

const HEAD: &str = "| measure | Kiln | peers | result | goal | met |\n|---|---|---|---|---|---|\n";

/// The whole document: `rows` from a fresh ext4, `on_host` from the host's own filesystem, which is `host`.
pub(crate) fn document(rows: &[Row], host: &str, on_host: &[Row], facts: &[(&str, String)]) -> String {
    let lines = |rows: &[Row]| rows.iter().map(|row| row.line() + "\n").collect::<String>();
    let mut text = format!(
        "# Benchmarks\n\n\
         Written by `cargo xtask bench`, which takes every figure in one run on one machine; figures are medians, and \
         contenders take turns. Run it on yours: the ratios are what should carry over.\n\n\
         All contenders work on a fresh ext4 (with a journal, as distributions make it) in a file:\n\n{HEAD}{}\n\
         On this host's own filesystem, {host}:\n\n{HEAD}{}\n\
         An ext4 without a journal looks at every inode that was deleted in the last minutes before it gives out a new \
         one (`recently_deleted` in a profile), so there whoever makes and deletes more files is slower the more was deleted \
         before. Kiln makes some twenty an instance.\n",
        lines(rows),
        lines(on_host)
    );
    text += "\n## The machine\n\n";
    for (name, value) in facts {
        text += &format!("- {name}: {value}\n");
    }
    text += "\n## How each is taken\n\n\
        - **Start**: `kiln run --rm --network none IMAGE true` from `fork` to exit, warm; the peers run `true` in a ready \
        bundle with the busybox root, unpacked and with the configuration of `runc spec`.\n\
        - **Pull**: into an empty store, from a registry on loopback, one gzip layer; `podman pull` with the overlay \
        driver, and `skopeo copy` into an OCI layout followed by `umoci unpack`.\n\
        - **Shared files**: every twentieth file of the Debian root changed, in one new layer; growth of the store by disk \
        blocks (`du`) beside the size of the second root.\n\
        - **Commit**: one changed file in a running container.\n\
        - **Memory**: proportional set size (`smaps_rollup`) of the process that owns a detached container.\n\
        - **At once**: fifty containers started together; until the last has ended.\n";
    text
}

/// Milliseconds or seconds, as fits.
pub(crate) fn seconds(value: f64) -> String {
    if value < 1.0 { format!("{:.1} ms", value * 1e3) } else { format!("{value:.2} s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missed_goal_stands_out() {
        let row = |met| Row {
            measure: "m".into(),
            kiln: seconds(0.0123),
            peers: seconds(2.5),
            result: "r".into(),
            goal: "g".into(),
            met,
        };
        assert_eq!(row(true).line(), "| m | 12.3 ms | 2.50 s | r | g | yes |");
        assert!(document(&[row(false)], "xfs", &[], &[("kernel", "6.18".into())]).contains("| **no** |"));
    }
}
