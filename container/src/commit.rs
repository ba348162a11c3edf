//! What an instance changed, as a layer on top of its image's stack.

use kiln_contract::{BackendError, Change, CommitOptions, Digest, Home, InstanceRecord};
use kiln_store::{Changes, CommitRequest, Store};

type Result<T> = std::result::Result<T, BackendError>;

/// Where the root of an instance differs from its image.
pub(crate) fn changes(home: &Home, record: &InstanceRecord) -> Result<Vec<Change>> {
    let directory = home.instance(&record.id);
    if !directory.upper().is_dir() {
        return Ok(Vec::new());
    }
    let store = open(home)?;
    let tree = store.merged_tree(&crate::root::stack(&store, &record.spec.layers)?).map_err(|error| {
        BackendError::caused(format!("cannot prepare the root of {}", record.spec.name), error)
    })?;
    kiln_view::changes(&tree, &directory.upper())
}

/// Makes an image of an instance that does not change meanwhile: suspended, stopped, or on the caller's word.
pub(crate) fn commit(home: &Home, record: &InstanceRecord, options: &CommitOptions) -> Result<Digest> {
    let spec = &record.spec;
    let store = open(home)?;
    let request = CommitRequest {
        name: &spec.name,
        image: Some(spec.image_id),
        layers: &spec.layers,
        command: &spec.process.args,
        options,
    };
    let upper = home.instance(&record.id).upper();
    let stack = crate::root::stack(&store, &spec.layers)?;
    let changes = if upper.is_dir() {
        Changes::Upper { directory: &upper, lower: &stack, map: &|id, _| id }
    } else {
        Changes::None
    };
    Ok(store.commit(&request, changes)?.id)
}

fn open(home: &Home) -> Result<Store> {
    Store::open(home).map_err(|error| BackendError::caused("cannot open the store", error))
}
