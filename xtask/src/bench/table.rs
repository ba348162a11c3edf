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

/// The whole document.
pub(crate) fn document(rows: &[Row], facts: &[(&str, String)]) -> String {
    let mut text = String::from(
        "# Benchmarks\n\n\
         Written by `cargo xtask bench`, which takes every figure in one run on one machine; figures are medians, and \
         contenders take turns. Run it on yours: the ratios are what should carry over.\n\n\
         | measure | Kiln | peers | result | goal | met |\n|---|---|---|---|---|---|\n",
    );
    for row in rows {
        text += &row.line();
        text.push('\n');
    }
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
        assert!(document(&[row(false)], &[("kernel", "6.18".into())]).contains("| **no** |"));
    }
}
