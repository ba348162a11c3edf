//! What a machine changed, as its guest tells it: an OCI layer's tar, which is unpacked as warily as one from a registry.

use std::fs::File;
use std::io::{Seek as _, SeekFrom};

use kiln_contract::{BackendError, Change, CommitOptions, Digest, Home, InstanceRecord};
use kiln_store::{Changes, CommitRequest, ImportLimits, Store};

type Result<T> = std::result::Result<T, BackendError>;

fn rewound(mut tar: File) -> Result<File> {
    tar.seek(SeekFrom::Start(0))
        .map_err(|error| BackendError::caused("cannot read a temporary file", error))?;
    Ok(tar)
}

fn import(store: &Store, tar: File) -> Result<Digest> {
    let fail = |error| BackendError::caused("cannot read what the guest says that it changed", error);
    store
        .import_tar(rewound(tar)?, None, ImportLimits::default())
        .map(|imported| imported.layer)
        .map_err(fail)
}

fn open(home: &Home) -> Result<Store> {
    Store::open(home).map_err(|error| BackendError::caused("cannot open the store", error))
}

/// Where the root differs from its image.
pub(crate) fn changes(home: &Home, record: &InstanceRecord, tar: File) -> Result<Vec<Change>> {
    let store = open(home)?;
    let layer = import(&store, tar)?;
    let fail = |error| BackendError::caused("cannot compare the machine with its image", error);
    let below = store.with_mount_points(&record.spec.layers).map_err(fail)?;
    let above = [below.as_slice(), &[layer]].concat();
    store.diff(&below, &above).map_err(fail)
}

/// Makes an image of it.
pub(crate) fn commit(
    home: &Home,
    record: &InstanceRecord,
    tar: File,
    options: &CommitOptions,
) -> Result<Digest> {
    let spec = &record.spec;
    let store = open(home)?;
    let request = CommitRequest {
        name: &spec.name,
        image: Some(spec.image_id),
        layers: &spec.layers,
        command: &spec.process.args,
        options,
    };
    Ok(store.commit(&request, Changes::Tar(&mut rewound(tar)?))?.id)
}
