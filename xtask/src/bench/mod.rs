//! `cargo xtask bench`: Kiln beside its peers on this machine, in one run, as medians and their ratios.
//!
//! Contenders take turns within each measure, so that whatever else the machine does meets them alike. The table goes to
//! the terminal and to `docs/benchmarks.md`. Nothing here fails because something is slow: a missed goal is written down.

mod bare;
mod disk;
mod docker;
mod machine;
mod machine_life;
mod machine_network;
mod measures;
mod peers;
mod router;
mod sampling;
mod slirp;
mod table;
mod view_trees;
mod views;
mod views_on_demand;

use std::process::Command;

use kiln_fixtures::{RegistryOptions, RegistryServer};

use crate::kiln;
use crate::setup;
use crate::shell::{Outcome, capture, root};
use measures::Images;
use table::Part;

/// Takes every measure and writes the tables. `--quick`: only to see whether all measures can be taken, and nothing is written.
/// `containers`, `machines` or `views`: only those; the other tables stay as they are.
pub(crate) fn run(arguments: &[String]) -> Outcome {
    const WORDS: [&str; 4] = ["--quick", "containers", "machines", "views"];
    if let Some(other) = arguments.iter().find(|word| !WORDS.contains(&word.as_str())) {
        return Err(format!("it takes `--quick`, `containers`, `machines` and `views`, and not {other}"));
    }
    let has = |word: &str| arguments.iter().any(|given| given == word);
    let quick = has("--quick");
    let all = !WORDS[1..].iter().any(|word| has(word));
    setup::for_benches()?;
    if !rustix::process::geteuid().is_root() {
        return Err("the peers (runc, umoci, podman) are measured as root: run it as root".to_owned());
    }
    let program = if quick { kiln::build_for_debugging()? } else { kiln::build()? };
    sampling::choose_rounds(quick);
    let disk = disk::Disk::mount()?;
    let missing = |what: &str| format!("cannot make {what}: see the skips above");
    let registry = RegistryServer::start(&RegistryOptions::default()).ok_or_else(|| missing("a registry"))?;
    let busybox_root = kiln_fixtures::busybox_rootfs().ok_or_else(|| missing("the busybox root"))?;
    let debian_root = kiln_fixtures::debian_rootfs().ok_or_else(|| missing("the Debian root"))?;
    let similar_root = measures::similar_root(&debian_root)?;
    let images = Images {
        busybox: pushed(&registry, "busybox", &busybox_root)?,
        debian: pushed(&registry, "debian", &debian_root)?,
        similar: pushed(&registry, "similar", &similar_root)?,
        busybox_root,
        similar_root,
    };

    let take = |measures: &[measures::Measure]| {
        let mut rows = Vec::new();
        for measure in measures {
            let found = measure(&program, &images)?;
            found.iter().for_each(|row| eprintln!("{}", row.line()));
            rows.extend(found);
        }
        Ok::<_, String>(rows)
    };
    let mut taken = Vec::new();
    if all || has("machines") {
        taken.push((Part::Machines, take(measures::OF_MACHINES)?));
    }
    if all || has("views") {
        taken.push((Part::Views, take(measures::OF_VIEWS)?));
    }
    if all || has("containers") {
        taken.push((Part::Containers, take(measures::OF_CONTAINERS)?));
        drop(disk);
        taken.push((Part::OnHost, take(measures::OF_FILESYSTEM)?));
    }
    let path = root().join("docs/benchmarks.md");
    let earlier = std::fs::read_to_string(&path).unwrap_or_default();
    let mut facts = machine::facts();
    facts.push(("its own filesystem", disk::of_host()));
    let document = table::document(&taken, &earlier, &facts);
    print!("{document}");
    if quick {
        return Ok(());
    }
    std::fs::write(&path, &document).map_err(|error| format!("cannot write {}: {error}", path.display()))
}

/// Makes an image of `rootfs`, pushes it with skopeo, and gives the reference to pull it by.
fn pushed(registry: &RegistryServer, name: &str, rootfs: &std::path::Path) -> Outcome<String> {
    let layout = kiln_fixtures::oci_layout(rootfs, "latest").ok_or("umoci is missing")?;
    let reference = format!("{}/{name}:latest", registry.address());
    let mut copy = Command::new("skopeo");
    copy.args(["--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false"]);
    copy.arg(format!("oci:{}:latest", layout.display())).arg(format!("docker://{reference}"));
    capture(&mut copy)?;
    Ok(reference)
}
