//! Stacks, mounted by the kernel.

use std::path::PathBuf;
use std::process::Command;

use kiln_contract::Digest;
use kiln_store::ImportedLayer;

use super::Fixture;

/// An overlay over the merged tree of a stack, as containers have it; gone when dropped.
pub struct Mounted {
    pub base: PathBuf,
}

impl Mounted {
    pub fn new(fixture: &Fixture, layers: &[Digest]) -> Self {
        let base = fixture.dir.path().join("mounts");
        for name in ["tree", "upper", "work", "root"] {
            std::fs::create_dir_all(base.join(name)).unwrap();
        }
        let tree = fixture.store.merged_tree(layers).unwrap();
        run(Command::new("mount").args(["-t", "erofs", "-o", "ro"]).arg(tree).arg(base.join("tree")));
        let options = format!(
            "metacopy=on,redirect_dir=on,lowerdir={base}/tree::{objects},upperdir={base}/upper,workdir={base}/work",
            base = base.display(),
            objects = fixture.store.objects_dir().display()
        );
        run(Command::new("mount").args(["-t", "overlay", "-o", &options, "overlay"]).arg(base.join("root")));
        Self { base }
    }

    pub fn root(&self) -> PathBuf {
        self.base.join("root")
    }

    pub fn sh(&self, script: &str) {
        run(Command::new("sh").args(["-ec", script]).current_dir(self.base.join("root")));
    }

    pub fn commit(&self, fixture: &Fixture, layers: &[Digest]) -> ImportedLayer {
        fixture.store.import_upper(&self.base.join("upper"), layers, &|id, _| id).unwrap()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        for name in ["root", "tree"] {
            let _ = Command::new("umount").arg(self.base.join(name)).status();
        }
    }
}

pub fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
