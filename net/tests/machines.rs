//! Machines on networks of containers, as their monitors connect them.

mod lab;

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;
use std::time::Duration;

use kiln_contract::{InstanceId, NetworkBackend as _, NetworkRequest, NetworkSpec};
use kiln_net::usernet::{Machine, Names as _, Route};
use kiln_net::{MachineNetwork, NetworkOptions, Networks};
use kiln_usernet::guest::{TunConfig, serve_tcp, serve_udp};
use lab::{Container, Lab, ip, run, state_of_host};
use tokio::io::DuplexStream;
use tokio::runtime::Runtime;
use tokio::sync::watch;

const PATIENCE: Duration = Duration::from_secs(5);
/// For what is not expected to happen.
const SHORT: Duration = Duration::from_millis(300);

/// A guest whose loopback is the one of the lab's host.
struct Guest;

impl kiln_usernet::Open for Guest {
    type Stream = DuplexStream;

    async fn open(&self, service: u16) -> std::io::Result<DuplexStream> {
        let (host, guest) = tokio::io::duplex(64 << 10);
        tokio::spawn(async move {
            let config = TunConfig::default();
            match service {
                kiln_usernet::TCP => serve_tcp(guest, &config).await,
                _ => serve_udp(guest, &config).await,
            }
        });
        Ok(host)
    }
}

fn request(name: &str, mode: &str) -> NetworkRequest {
    NetworkRequest {
        id: InstanceId::random(),
        name: name.into(),
        hostname: format!("{name}-host"),
        network: NetworkSpec { mode: mode.into(), aliases: vec!["Also".into()], ..NetworkSpec::default() },
        ports: Vec::new(),
        namespace: None,
    }
}

/// A runtime whose threads are in the lab: they inherit the namespace of the one that makes them.
fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn serve_with(runtime: &Runtime, machine: &mut MachineNetwork) -> watch::Sender<Arc<Guest>> {
    let (sessions, watched) = watch::channel(Arc::new(Guest));
    runtime.block_on(async { machine.serve(&watched) }).unwrap();
    sessions
}

/// Says hello to whoever comes to this port of the lab's loopback.
fn greet(port: u16) {
    let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
    let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
    std::thread::spawn(move || {
        for mut client in tcp.incoming().flatten() {
            let mut words = String::new();
            let _ = client.read_to_string(&mut words);
            let _ = client.write_all(format!("hello {words}").as_bytes());
        }
    });
    std::thread::spawn(move || {
        let mut words = [0; 1000];
        while let Ok((length, client)) = udp.recv_from(&mut words) {
            let _ = udp.send_to(&[b"hello ", &words[..length]].concat(), client);
        }
    });
}

fn over_tcp(to: SocketAddr, wait: Duration) -> Option<String> {
    let mut stream = TcpStream::connect_timeout(&to, wait).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"tcp").ok()?;
    stream.shutdown(Shutdown::Write).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    (!answer.is_empty()).then_some(answer)
}

fn over_udp(to: SocketAddr, wait: Duration) -> Option<String> {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.set_read_timeout(Some(wait)).unwrap();
    socket.connect(to).ok()?;
    let mut answer = [0; 100];
    let mut said = None;
    for word in ["one", "two", "three"] {
        socket.send(word.as_bytes()).ok()?;
        let length = socket.recv(&mut answer).ok()?;
        said = Some(String::from_utf8_lossy(&answer[..length]).into_owned());
    }
    said
}

#[test]
fn a_machine_on_a_bridge_is_reached_by_name_at_every_port_by_its_network_only() {
    let Some(lab) = Lab::enter() else { return };
    let before = state_of_host();
    let networks = Networks::open(&lab.home);
    networks.create("shop", &NetworkOptions::default()).unwrap();
    networks.create("other", &NetworkOptions::default()).unwrap();
    let runtime = runtime();
    let asked = request("vm", "shop");
    let mut machine = MachineNetwork::join(&lab.home, &asked).unwrap();
    let sessions = serve_with(&runtime, &mut machine);
    let (web, far) = (Container::start(), Container::start());
    let (mut near_network, mut far_network) = (lab.network(), lab.network());
    let attachment = web.connect(&mut near_network, "web", "shop", &[]);
    far.connect(&mut far_network, "far", "other", &[]);
    for port in [7000, 7001] {
        greet(port);
    }
    for name in ["vm", "also", "vm-host.kiln.internal", asked.id.short()] {
        let answer = web.run(&format!("busybox nslookup -type=a {name} 127.0.0.11")).unwrap();
        assert!(answer.contains(&format!("Address: {}", machine.address())), "{name}: {answer}");
    }
    for port in [7000, 7001] {
        let to = SocketAddr::new(machine.address(), port);
        assert_eq!(web.inside(|| over_tcp(to, PATIENCE)).as_deref(), Some("hello tcp"), "{port}");
        assert_eq!(web.inside(|| over_udp(to, PATIENCE)).as_deref(), Some("hello three"), "{port}");
        assert_eq!(over_tcp(to, PATIENCE).as_deref(), Some("hello tcp"), "the host's own processes, {port}");
        assert_eq!(far.inside(|| over_tcp(to, SHORT)), None, "another network, {port}");
        assert_eq!(far.inside(|| over_udp(to, SHORT)), None, "another network, {port}");
    }
    assert_eq!(
        web.inside(|| over_tcp(SocketAddr::new(machine.address(), 7002), PATIENCE)),
        None,
        "nobody listens"
    );

    let neighbours = machine.neighbours(|_| Machine::new(Arc::new(Guest)));
    let web_address = attachment.addresses[0];
    assert_eq!(neighbours.addresses("web"), Some(vec![web_address]));
    assert_eq!(neighbours.addresses("far"), None, "of another network");
    assert_eq!(neighbours.names(machine.address())[..2], ["vm", "also"]);
    assert!(matches!(neighbours.route(web_address), Some(Route::Address(_))));
    assert!(matches!(neighbours.route(machine.address()), Some(Route::Machine(_))));
    let far_address: IpAddr = far_network.address(&far.id).unwrap()[0];
    assert!(neighbours.route(far_address).is_none() && neighbours.elsewhere(far_address).is_some());

    let refused = networks.remove("shop").unwrap_err().to_string();
    assert!(refused.contains("in use by 2 instance(s)"), "{refused}");
    near_network.teardown(&web.id).unwrap();
    assert_eq!(neighbours.addresses("web"), None, "it has gone");
    drop((sessions, machine));
    MachineNetwork::leave(&lab.home, &asked.id).unwrap();
    far_network.teardown(&far.id).unwrap();
    networks.remove("shop").unwrap();
    networks.remove("other").unwrap();
    assert_eq!(state_of_host().replace("ip_forward = 1", ""), before, "{}", run("nft list ruleset"));
}

#[test]
fn an_address_goes_with_its_machine_while_the_bridge_stays() {
    let Some(lab) = Lab::enter() else { return };
    Networks::open(&lab.home).create("shop", &NetworkOptions::default()).unwrap();
    let (first, second) = (request("first", "shop"), request("second", "shop"));
    let one = MachineNetwork::join(&lab.home, &first).unwrap();
    let two = MachineNetwork::join(&lab.home, &second).unwrap();
    assert_ne!(one.address(), two.address());
    let interfaces = || ip("-o link").matches("klv").count();
    assert_eq!(interfaces(), 2);
    // Killed, its namespace goes with it, and with that its interface; whoever finds it gone takes its lease.
    drop(one);
    lab::wait_for("its interface to go", || interfaces() == 1);
    MachineNetwork::leave(&lab.home, &first.id).unwrap();
    let neighbours = two.neighbours(|_| Machine::new(Arc::new(Guest)));
    assert_eq!(
        (neighbours.addresses("first"), neighbours.addresses("second")),
        (None, Some(vec![two.address()]))
    );
    // And the same machine again, without having left.
    let again = MachineNetwork::join(&lab.home, &second).unwrap();
    assert_eq!(interfaces(), 1);
    MachineNetwork::leave(&lab.home, &second.id).unwrap();
    drop((two, again));
    assert!(!run("nft list ruleset").contains("kiln_"));
}

#[test]
fn a_network_without_a_bridge_changes_nothing_of_the_host_and_has_machines_only() {
    let Some(lab) = Lab::enter() else { return };
    let before = state_of_host();
    let networks = Networks::open(&lab.home);
    let options = NetworkOptions { usernet: true, ..NetworkOptions::default() };
    let made = networks.create("cells", &options).unwrap();
    assert!(made.interface.is_empty() && made.subnet.is_some());
    let (a, b) = (request("a", "cells"), request("b", "cells"));
    let (one, two) =
        (MachineNetwork::join(&lab.home, &a).unwrap(), MachineNetwork::join(&lab.home, &b).unwrap());
    let neighbours = one.neighbours(|_| Machine::new(Arc::new(Guest)));
    assert_eq!(neighbours.addresses("b"), Some(vec![two.address()]));
    assert_eq!(neighbours.addresses("also").map(|all| all.len()), Some(2));
    let container = Container::start();
    let refused = lab.network().setup(&container.request("c", "cells")).unwrap_err().to_string();
    assert!(refused.contains("machines can be on it"), "{refused}");
    assert_eq!(state_of_host(), before);
    for id in [&a.id, &b.id] {
        MachineNetwork::leave(&lab.home, id).unwrap();
    }
    networks.remove("cells").unwrap();
}

#[test]
fn an_ordinary_user_hears_that_such_a_network_is_for_machines_and_not_that_it_takes_root() {
    let Some(lab) = Lab::enter() else { return };
    let Some(user) = kiln_fixtures::OrdinaryUser::get() else { return };
    let options = NetworkOptions { usernet: true, ..NetworkOptions::default() };
    Networks::open(&lab.home).create("cells", &options).unwrap();
    std::fs::set_permissions(lab.home.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    let program = lab.home.path().join("supervisor");
    std::fs::copy(lab::Supervisor::program(), &program).unwrap();
    let said = |network: &str| {
        let mut command = user.command(&program);
        let output = command.arg(lab.home.path()).args([network, "1", "c"]).output().unwrap();
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert!(said("cells").contains("machines can be on it"), "{}", said("cells"));
    assert!(said("kiln").contains("takes root's rights"), "{}", said("kiln"));
}
