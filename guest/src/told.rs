//! What the host says on the kernel's command line, where a machine's devices cannot say it themselves: a hypervisor that gives
//! disks no names, a link that is a socket. `kiln.<name>=<value>`, for the names
//!
//! - `link`: `vsock:<port>`, where the guest listens; a virtio-serial port otherwise
//! - `image`, `disk`: the path of the device; found by its serial number otherwise
//! - `network`: `device`, if the machine has a network device
//! - `off`: `restart`, if a machine ends by that; it powers off otherwise

use rustix::system::RebootCommand;

/// The value of a name, if it was said.
pub(crate) fn told(name: &str) -> Option<String> {
    find(&std::fs::read_to_string("/proc/cmdline").ok()?, name).map(str::to_owned)
}

fn find<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    line.split_ascii_whitespace()
        .find_map(|word| word.strip_prefix("kiln.")?.strip_prefix(name)?.strip_prefix('='))
}

/// Ends the machine.
pub(crate) fn off() -> rustix::io::Result<()> {
    rustix::system::reboot(match told("off").as_deref() {
        Some("restart") => RebootCommand::Restart,
        _ => RebootCommand::PowerOff,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_found_by_whole_names() {
        let line =
            "console=ttyS0 kiln.linked=no kiln.link=vsock:1024 akiln.disk=no kiln.disk=/dev/vdb quiet\n";
        for (name, value) in
            [("link", Some("vsock:1024")), ("disk", Some("/dev/vdb")), ("image", None), ("lin", None)]
        {
            assert_eq!(find(line, name), value, "{name}");
        }
    }
}
