//! What unit tests begin with.

use kiln_contract::{Digest, InstanceSpec, ProcessSpec, RestartPolicy, RuntimeChoice};

/// A specification of nothing in particular.
pub(crate) fn spec(name: &str) -> InstanceSpec {
    InstanceSpec {
        name: name.into(),
        isolation: kiln_contract::Isolation::Container,
        image: "sample".into(),
        image_id: Digest::of(b"sample"),
        layers: vec![Digest::of(b"layer")],
        process: ProcessSpec { args: vec!["true".into()], cwd: "/".into(), ..ProcessSpec::default() },
        hostname: None,
        mounts: Vec::new(),
        network: kiln_contract::NetworkSpec::default(),
        ports: Vec::new(),
        resources: kiln_contract::Resources::default(),
        security: kiln_contract::SecuritySpec::default(),
        restart: RestartPolicy::No,
        stop: kiln_contract::StopSpec::default(),
        health: None,
        labels: std::collections::BTreeMap::new(),
        init: false,
        remove: false,
        runtime: RuntimeChoice::Native,
    }
}
