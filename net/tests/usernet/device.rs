//! What the guest's half makes in the guest.

use kiln_usernet::guest::{GuestError, Tun, TunConfig};

use crate::lab::{Container, Lab};

#[test]
fn the_device_has_its_addresses_and_the_default_routes_as_long_as_it_lives() {
    let Some(_lab) = Lab::enter() else { return };
    let guest = Container::start();
    let tun = guest.inside(|| Tun::create(&TunConfig::default()).unwrap());
    let show = |line: &str| guest.run(&format!("ip -o {line}")).unwrap();
    let link = show("link show kiln0");
    for word in ["mtu 65535", "qlen 4096", "UP"] {
        assert!(link.contains(word), "{word}: {link}");
    }
    assert!(show("addr show kiln0").contains("192.0.0.2/29"));
    let v6 = show("-6 addr show kiln0");
    let own = v6.lines().find(|line| line.contains("fd6b:696c:6e00::2/64")).unwrap();
    assert!(!own.contains("tentative"), "{own}");
    assert!(show("route").contains("default via 192.0.0.1 dev kiln0"));
    assert!(show("-6 route").contains("default via fd6b:696c:6e00::1 dev kiln0"));

    let again = guest.inside(|| Tun::create(&TunConfig::default()).unwrap_err());
    assert!(
        matches!(&again, GuestError::System { doing, .. } if doing == "making the device kiln0"),
        "{again}"
    );
    drop(tun);
    assert!(guest.run("ip link show kiln0").is_none());
}

#[test]
fn a_guest_that_does_without_ipv6_has_ipv4_all_the_same() {
    let Some(_lab) = Lab::enter() else { return };
    let guest = Container::start();
    let _tun = guest.inside(|| {
        std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
        Tun::create(&TunConfig::default()).unwrap()
    });
    assert!(guest.run("ip -o addr show kiln0").unwrap().contains("192.0.0.2/29"));
    assert!(guest.run("ip -o route").unwrap().contains("default via 192.0.0.1"));
    assert_eq!(guest.run("ip -o -6 addr show kiln0").unwrap(), "");
}
