//! What an instance's mounts are on this host.

use std::fs;
use std::io::{self, Seek as _};
use std::path::Path;

use kiln_contract::{BackendError, ErrorKind, InstanceSpec, MountKind, MountSpec};
use kiln_instance::archive::{Base, Confine, Pack, Top, pack};
use kiln_instance::{Volume, Volumes};

use crate::runtime::ResolvedMount;

type Result<T> = std::result::Result<T, BackendError>;

/// The mounts of `spec`. New volumes are filled from `root`, its mounted root.
pub(crate) fn resolve(volumes: &Volumes, spec: &InstanceSpec, root: &Path) -> Result<Vec<ResolvedMount>> {
    // Parents before what is mounted in them.
    let mut mounts: Vec<&MountSpec> = spec.mounts.iter().collect();
    mounts.sort_by_key(|mount| Path::new(&mount.target).components().count());
    mounts.into_iter().map(|mount| resolve_one(volumes, mount, root)).collect()
}

fn resolve_one(volumes: &Volumes, mount: &MountSpec, root: &Path) -> Result<ResolvedMount> {
    match &mount.kind {
        MountKind::Tmpfs(options) => Ok(ResolvedMount::tmpfs(&mount.target, options, mount.read_only)),
        MountKind::Bind { source, create, propagation } => {
            bindable(source, *create)?;
            Ok(ResolvedMount::bind(source, &mount.target, mount.read_only, propagation.as_deref()))
        }
        MountKind::Volume { name, copy } => {
            let volume = volumes.create(name.as_deref(), &std::collections::BTreeMap::new())?;
            if *copy && volume.is_empty() {
                fill(&volume, root, &mount.target)?;
            }
            Ok(ResolvedMount::bind(&volume.path, &mount.target, mount.read_only, None))
        }
    }
}

fn bindable(source: &Path, create: bool) -> Result<()> {
    let failed = |error| {
        BackendError::caused(format!("cannot bind {}", source.display()), error).of_kind(ErrorKind::Invalid)
    };
    match fs::metadata(source) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound && !create => {
            Err(failed(error).hint("make it first; `-v` makes what is missing"))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::create_dir_all(source).map_err(|error| {
                BackendError::caused(format!("cannot make {} to bind it", source.display()), error)
                    .of_kind(ErrorKind::Invalid)
            })
        }
        Err(error) => Err(failed(error)),
    }
}

/// Copies what the image has at `target` into a new volume, the directory's own owner and mode included.
fn fill(volume: &Volume, root: &Path, target: &str) -> Result<()> {
    let failed = |error: Box<dyn std::error::Error + Send + Sync>| {
        BackendError::caused(
            format!("cannot fill the volume {} from the image's {target}", volume.name),
            error,
        )
    };
    let from = Base::open(root, Confine::InRoot).map_err(|error| failed(error.into()))?;
    match from.directory(Path::new(target)) {
        // The image has nothing there, or a file: nothing to fill a volume with.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(());
        }
        Err(error) => return Err(failed(error.into())),
        Ok(_) => {}
    }
    let mut spool = tempfile::tempfile().map_err(|error| failed(error.into()))?;
    // `.` as the last part: entries are named below the volume's own root.
    let inside = Base::open_below(&from, Path::new(target)).map_err(|error| failed(error.into()))?;
    let what = Pack { path: Path::new("/"), top: Top::Own, follow: false, owners: true };
    pack(&inside, &what, &mut spool).map_err(|error| failed(error.into()))?;
    spool.rewind().map_err(|error| failed(error.into()))?;
    volume.fill(&mut spool)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use kiln_contract::Home;

    use super::*;

    #[test]
    fn a_new_volume_has_what_the_image_has_there() {
        let directory = tempfile::tempdir().unwrap();
        let volumes = Volumes::open(&Home::at(directory.path()));
        let root = directory.path().join("root");
        fs::create_dir_all(root.join("srv/data/sub")).unwrap();
        fs::write(root.join("srv/data/sub/f"), "from the image").unwrap();
        fs::set_permissions(root.join("srv/data"), fs::Permissions::from_mode(0o1750)).unwrap();
        symlink("/srv", root.join("link")).unwrap();
        let volume = volumes.create(Some("v"), &BTreeMap::new()).unwrap();
        fill(&volume, &root, "/link/data").unwrap();
        assert_eq!(fs::read(volume.path.join("sub/f")).unwrap(), b"from the image");
        assert_eq!(fs::metadata(&volume.path).unwrap().permissions().mode() & 0o7777, 0o1750);
        let other = volumes.create(Some("w"), &BTreeMap::new()).unwrap();
        fill(&other, &root, "/nothing/here").unwrap();
        assert!(other.is_empty());
    }
}
