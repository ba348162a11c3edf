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

/// The tables, by their headings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Containers,
    OnHost,
    Machines,
    Views,
}

impl Part {
    pub(crate) const ALL: [Self; 4] = [Self::Containers, Self::OnHost, Self::Machines, Self::Views];

    fn heading(self) -> &'static str {
        match self {
            Self::Containers => "Containers",
            Self::OnHost => "Containers on the host's own filesystem",
            Self::Machines => "Machines",
            Self::Views => "Views",
        }
    }

    /// What is said below the table.
    fn remark(self) -> &'static str {
        match self {
            Self::OnHost => {
                "\nAn ext4 without a journal looks at every inode that was deleted in the last minutes before it gives out a \
                 new one (`recently_deleted` in a profile), so there whoever makes and deletes more files is slower the more was \
                 deleted before. Kiln makes some twenty an instance.\n"
            }
            Self::Machines => {
                "\nWhat keeps goals out of reach where machines are emulated:\n\n\
                 - **A start without a spare machine, a live fork, memory**: QEMU translates what the guest executes anew in each \
                 process, some seven microseconds a piece of code, and keeps it there: until a copy has run its first command \
                 these are some 26,000 pieces (`-d in_asm` lists them), 19,000 of them the kernel's. The second figures of the \
                 bare guest show what a shell's starting one program adds to a restore; Kiln's guest is told who it is besides. \
                 With KVM, or when a spare machine waits, nothing of it is left.\n\
                 - **`usernet` outward**: all of a machine's network goes through the link, whose port QEMU fills 4 KiB at a time. It \
                 is as fast as the link is; QEMU's own network has a device to itself.\n"
            }
            Self::Views => {
                "\nWhat keeps goals out of reach:\n\n\
                 - **A file read in an editable view**: the kernel fills its cache of a FUSE file page by page, with what a server \
                 has copied. fuse-overlayfs, in C and with splice(2), takes as long or longer.\n\
                 - **A commit of many files**: each becomes an object, a file of its own, which is on the disk before it is named. To \
                 have as many files on the disk at all (`cp -r` and `sync`) takes longer than the goal.\n"
            }
            Self::Containers => "",
        }
    }

    /// The rows that a document has already.
    fn rows_in(self, document: &str) -> String {
        let heading = format!("\n## {}\n", self.heading());
        let section = document.split_once(&heading).map_or("", |(_, rest)| rest);
        let table =
            section.split("\n## ").next().unwrap_or_default().lines().filter(|line| line.starts_with('|'));
        table.skip(HEAD.lines().count()).map(|line| format!("{line}\n")).collect()
    }
}

/// The whole document: what was taken now, and of `earlier` what was not.
pub(crate) fn document(taken: &[(Part, Vec<Row>)], earlier: &str, facts: &[(&str, String)]) -> String {
    let mut text = String::from(
        "# Benchmarks\n\n\
         Written by `cargo xtask bench`. The figures of a table were taken in one run on one machine; they are medians, and \
         contenders take turns. Run it on yours: the ratios are what should carry over. Unless said otherwise, all contenders \
         work on a fresh ext4 (with a journal, as distributions make it) in a file.\n",
    );
    for part in Part::ALL {
        let rows = match taken.iter().find(|(of, _)| *of == part) {
            Some((_, rows)) => rows.iter().map(|row| row.line() + "\n").collect(),
            None => part.rows_in(earlier),
        };
        text += &format!("\n## {}\n\n{HEAD}{rows}{}", part.heading(), part.remark());
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
        - **At once**: fifty containers started together; until the last has ended.\n\
        - **Machines**: one processor, 512 MiB (256 MiB for boots, forks and memory), Debian's kernel. Docker runs the same \
        busybox root with an engine of its own, without a network. The bare QEMU has the same machine, kernel and \
        processor, a busybox shell for an init, and one port; it is saved and restored as machines are, by hand. It answers \
        before and after its shell has run `/bin/busybox true`: what QEMU has to translate for a command is in the second figure, \
        and in Kiln's.\n\
        - **`usernet`**: both guests have one processor, 512 MiB and Debian's kernel, run the same two commands of busybox, and \
        are timed by the host: from the connection to the last byte.\n\
        - **9P and `cp`**: beside them `kiln exec` with a file or `/dev/zero` at one end and `/dev/null` at the other, which is \
        a stream of the link and nothing else, written and read in pieces of 1 MiB as files are. A rate of 0.7 is a time of \
        1.43.\n\
        - **Views**: from the start of `kiln fs run` to its end, as root; their images are of tars of one layer. Cold is after the \
        kernel has forgotten names, attributes and data (`drop_caches` 3), as after a boot, and has starting and mounting in it for \
        those that do; warm is the second time in one view, timed within. The kernel's overlay and fuse-overlayfs lie over plain \
        directories with the same files. Files that are read are in the page cache, and servers have not opened them before. `tar` \
        and `sha256sum` write nothing.\n";
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
        let document = document(&[(Part::Views, vec![row(false)])], "", &[("kernel", "6.18".into())]);
        assert!(document.contains("| **no** |"));
    }

    #[test]
    fn what_was_not_taken_stays() {
        let row = |measure: &str| Row {
            measure: measure.into(),
            kiln: seconds(1.0),
            peers: String::new(),
            result: String::new(),
            goal: String::new(),
            met: true,
        };
        let first = document(&[(Part::Machines, vec![row("m")]), (Part::Views, vec![row("v")])], "", &[]);
        let second = document(&[(Part::Views, vec![row("w")])], &first, &[]);
        assert_eq!(second, first.replace("| v |", "| w |"));
    }
}
