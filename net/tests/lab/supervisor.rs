//! Connects a network namespace, as a supervisor does: `kiln-net-supervisor HOME MODE PID NAME [ID [PORT]]`.
//!
//! Prints one line of JSON, serves names until its standard input ends, and then takes everything away again.

use std::error::Error;
use std::io::{self, Read, Write};

use kiln_contract::{Home, InstanceId, NetworkBackend, NetworkRequest, NetworkSpec, Protocol, PublishSpec};
use kiln_net::ContainerNetwork;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [home, mode, pid, name, rest @ ..] = arguments.as_slice() else {
        return Err("usage: kiln-net-supervisor HOME MODE PID NAME [ID [PORT]]".into());
    };
    let id = match rest.first() {
        Some(id) => id.parse()?,
        None => InstanceId::random(),
    };
    let ports = match rest.get(1) {
        Some(port) => vec![PublishSpec {
            host_address: None,
            host_port: 0,
            host_port_last: None,
            container_port: port.parse()?,
            protocol: Protocol::Tcp,
        }],
        None => Vec::new(),
    };
    let request = NetworkRequest {
        id: id.clone(),
        name: name.clone(),
        hostname: name.clone(),
        network: NetworkSpec { mode: mode.clone(), ..NetworkSpec::default() },
        ports,
        namespace: Some(format!("/proc/{pid}/ns/net").into()),
    };
    let mut network = ContainerNetwork::new(&Home::at(home));
    let attachment = network.setup(&request)?;
    let told = serde_json::json!({
        "addresses": attachment.addresses,
        "ports": attachment.ports,
        "resolv_conf": attachment.resolv_conf,
        "hosts": attachment.hosts,
    });
    writeln!(io::stdout(), "{told}")?;
    io::stdin().read_to_end(&mut Vec::new())?;
    network.teardown(&id)?;
    Ok(())
}
