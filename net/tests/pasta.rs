//! The network of unprivileged containers, with the real pasta, as root and as an ordinary user.

#![cfg(target_os = "linux")]

mod lab;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use kiln_contract::{ErrorKind, NetworkBackend, NetworkRequest, Protocol, PublishSpec};
use lab::{Container, Lab, Supervisor, ip, state_of_host, wait_for};
use rustix::mount::{MountPropagationFlags, mount_bind, mount_change};
use rustix::thread::UnshareFlags;

/// The test's own host, connected to a network, with a `/dev/net/tun` that everybody may open as distributions have it.
fn lab() -> Option<Lab> {
    kiln_fixtures::require("pasta")?;
    let lab = Lab::enter()?;
    if !Path::new("/dev/net/tun").exists() {
        kiln_fixtures::skip("this kernel has no /dev/net/tun");
        return None;
    }
    // SAFETY: only the calling thread gets a mount table of its own; no memory or descriptor is shared less.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS).unwrap() };
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
    // A file system that certainly has devices, which the one of temporary files may not.
    let devices = lab.home.path().join("devices");
    fs::create_dir(&devices).unwrap();
    lab::run(&format!("mount -t tmpfs tmpfs {}", devices.display()));
    let tun = devices.join("tun");
    lab::run(&format!("mknod -m 666 {} c 10 200", tun.display()));
    mount_bind(&tun, "/dev/net/tun").unwrap();
    // The device stays, its directory can be removed again.
    lab::run(&format!("umount --lazy {}", devices.display()));
    ip("link add name wan0 type bridge");
    ip("addr add 198.51.100.1/24 dev wan0");
    ip("link set wan0 up");
    ip("route add default via 198.51.100.254 dev wan0");
    Some(lab)
}

fn fetch(port: u16) -> Option<String> {
    let mut connection = TcpStream::connect(("127.0.0.1", port)).ok()?;
    let mut text = String::new();
    connection.read_to_string(&mut text).ok()?;
    Some(text)
}

#[test]
fn root_may_ask_for_pasta_and_nothing_is_left_of_it() {
    let Some(lab) = lab() else { return };
    let before = state_of_host();
    let (container, mut network) = (Container::start(), lab.network());
    let port = |host_port, protocol| PublishSpec {
        host_address: None,
        host_port,
        host_port_last: None,
        container_port: 80,
        protocol,
    };
    let request = NetworkRequest {
        ports: vec![port(0, Protocol::Tcp), port(0, Protocol::Udp)],
        ..container.request("web", "pasta")
    };
    let attachment = network.setup(&request).unwrap();
    assert_eq!(attachment.addresses, network.address(&container.id).unwrap());
    assert_eq!(attachment.addresses, lab.network().address(&container.id).unwrap(), "others can tell it too");
    assert!(attachment.resolv_conf.unwrap().starts_with("nameserver 169.254.1.1\n"));
    let listener = container.inside(|| TcpListener::bind("0.0.0.0:80").unwrap());
    std::thread::spawn(move || {
        while let Ok((mut connection, _)) = listener.accept() {
            let _ = connection.write_all(b"web");
        }
    });
    assert_eq!(fetch(attachment.ports[0].host_port).as_deref(), Some("web"));

    let second = Container::start();
    let again =
        NetworkRequest { ports: vec![attachment.ports[0].clone()], ..second.request("second", "pasta") };
    let error = lab.network().setup(&again).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");

    network.teardown(&container.id).unwrap();
    assert!(fetch(attachment.ports[0].host_port).is_none());
    assert!(!lab.home.instance(&container.id).path().join("pasta.json").exists());
    assert_eq!(state_of_host(), before);
}

#[test]
fn an_ordinary_users_container_is_connected_and_pasta_ends_with_its_supervisor() {
    let Some(lab) = lab() else { return };
    let Some(user) = kiln_fixtures::OrdinaryUser::get() else { return };
    // The program, where that user can run it.
    fs::set_permissions(lab.home.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let program = lab.home.path().join("supervisor");
    fs::copy(Supervisor::program(), &program).unwrap();
    // Root in a user namespace of its own, as Kiln is for ordinary users; the container's namespace belongs to it.
    let script = format!(
        "unshare --net sleep 600 & echo $!; read go; exec {} {} default $! web",
        program.display(),
        lab.home.path().join("home").display()
    );
    let mut command = user.command(Path::new("/usr/bin/unshare"));
    command.args(["--user", "--map-root-user", "sh", "-c"]).arg(format!("{script} {} 80", "5".repeat(64)));
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    let container: u32 = line.trim().parse().unwrap();
    let own = fs::read_link("/proc/thread-self/ns/net").unwrap();
    let namespace = format!("/proc/{container}/ns/net");
    wait_for("a namespace", || fs::read_link(&namespace).is_ok_and(|other| other != own));
    child.stdin.as_mut().unwrap().write_all(b"go\n").unwrap();
    line.clear();
    output.read_line(&mut line).unwrap();
    let told: serde_json::Value = serde_json::from_str(&line).expect("what the supervisor tells");
    assert_eq!(told["addresses"][0], "198.51.100.1", "{told}");
    let inside = |command: &str| {
        let pid = container.to_string();
        let output = Command::new("nsenter").args(["-t", &pid, "-n", "sh", "-c", command]).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let route = inside("ip route");
    assert!(route.contains("default via 198.51.100.254 dev eth0"), "{route}");
    let mut server = Command::new("nsenter")
        .args(["-t", &container.to_string(), "-n", "busybox", "nc", "-l", "-p", "80", "-e", "echo", "web"])
        .spawn()
        .unwrap();
    let port = told["ports"][0]["host_port"].as_u64().unwrap() as u16;
    wait_for("the server", || inside("ss -Hltn sport = :80").contains(":80"));
    assert_eq!(fetch(port).as_deref(), Some("web\n"));
    let _ = server.wait();

    let state: serde_json::Value = serde_json::from_slice(
        &fs::read(lab.home.path().join(format!("home/instances/{}/pasta.json", "5".repeat(64)))).unwrap(),
    )
    .unwrap();
    let pasta = format!("/proc/{}/stat", state["process"]["pid"]);
    assert!(Path::new(&pasta).exists());
    // As `kill -9` of the supervisor: nobody is asked to clean up.
    child.kill().unwrap();
    child.wait().unwrap();
    wait_for("pasta to end", || {
        !Path::new(&pasta).exists() || fs::read_to_string(&pasta).is_ok_and(|stat| stat.contains(") Z "))
    });
    let _ = Command::new("kill").args(["-9", &container.to_string()]).status();
}
