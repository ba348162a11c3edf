//! QEMU's command line.
//!
//! The order of the devices is part of every saved state: virtio-mmio gives out its slots in that order.

use std::ffi::OsString;
use std::path::Path;
#[cfg(target_arch = "x86_64")]
use std::time::Instant;

use kiln_contract::{MemoryKind, VmConfig};

use crate::Accelerator;

/// The writable disk's name in QEMU.
pub(super) const DISK: &str = "disk";
/// The serial console's socket, in the machine's directory.
const CONSOLE: &str = "console.sock";
/// What was written to the serial console.
const CONSOLE_LOG: &str = "console.log";

/// Descriptors that the process inherits.
#[derive(Debug, Clone, Copy)]
pub(super) struct Inherited {
    pub(super) link: i32,
    pub(super) monitor: i32,
    /// The state to load, if it is not to boot.
    pub(super) state: Option<i32>,
    /// The host's end of a network device.
    pub(super) network: Option<i32>,
}

pub(super) fn arguments(config: &VmConfig, accelerator: &Accelerator, inherited: Inherited) -> Vec<OsString> {
    let mib = config.memory >> 20;
    let share = match config.memory_kind {
        MemoryKind::Written => "on",
        MemoryKind::CopyOnWrite => "off",
    };
    let mut line = Line::default();
    let accelerator_options = match accelerator {
        Accelerator::Kvm => "kvm".to_owned(),
        // One thread a virtual processor.
        Accelerator::Tcg { .. } => "tcg,thread=multi".to_owned(),
    };
    let (machine, cpu) = match (cfg!(target_arch = "x86_64"), accelerator) {
        // ACPI is how an ordinary kernel finds virtio-mmio devices.
        (true, Accelerator::Kvm) => ("microvm,acpi=on", "host"),
        (true, Accelerator::Tcg { .. }) => ("microvm,acpi=on", TRANSLATED_PROCESSOR),
        (false, Accelerator::Kvm) => ("virt,gic-version=host", "host"),
        (false, Accelerator::Tcg { .. }) => ("virt,gic-version=3", "max"),
    };
    line.add("-nodefaults").add("-no-user-config").add("-no-reboot");
    line.pair("-display", "none");
    line.pair("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
    line.pair("-machine", format!("{machine},memory-backend=memory,suppress-vmdesc=on"));
    line.pair("-accel", accelerator_options).pair("-cpu", cpu);
    line.pair("-smp", config.cpus.to_string()).pair("-m", format!("{mib}M"));
    line.pair("-global", "migration.send-configuration=off");
    line.pair(
        "-object",
        joined(
            &format!("memory-backend-file,id=memory,size={mib}M,share={share},mem-path="),
            &config.memory_file,
        ),
    );
    match &config.boot {
        Some(boot) => {
            line.pair("-kernel", &boot.kernel).pair("-initrd", &boot.initramfs);
            // Nobody in the machine gives the device another name.
            let network = if inherited.network.is_some() { " kiln.network=device net.ifnames=0" } else { "" };
            line.pair("-append", format!("{}{network} {}", own_words(accelerator), boot.command_line));
            line.add("-S");
        }
        None => {
            if let Some(state) = inherited.state {
                line.pair("-incoming", format!("fd:{state}"));
            }
        }
    }
    line.pair(
        "-chardev",
        format!("socket,id=console,path={CONSOLE},server=on,wait=off,logfile={CONSOLE_LOG},logappend=on"),
    );
    line.pair("-serial", "chardev:console");
    line.pair("-drive", joined("if=none,id=image,format=raw,readonly=on,file=", &config.image));
    line.pair("-device", "virtio-blk-device,drive=image,serial=kiln-image");
    line.pair(
        "-drive",
        joined(
            &format!("if=none,id={DISK},format=raw,discard=unmap,detect-zeroes=unmap,file="),
            &config.disk,
        ),
    );
    line.pair("-device", format!("virtio-blk-device,drive={DISK},serial=kiln-disk"));
    line.pair("-chardev", format!("socket,id=link,fd={}", inherited.link));
    line.pair("-device", "virtio-serial-device");
    line.pair("-device", "virtserialport,chardev=link,name=kiln.link");
    line.pair("-device", "virtio-rng-device");
    // Without free-page reporting: QEMU punches what is reported out of the memory file even if that is mapped privately, and so
    // out of the memory of every other machine that was or will be restored over it.
    line.pair("-device", "virtio-balloon-device");
    if let Some(network) = inherited.network {
        line.pair("-netdev", format!("tap,id=network,fd={network}"));
        line.pair("-device", "virtio-net-device,netdev=network");
    }
    line.pair("-chardev", format!("socket,id=monitor,fd={}", inherited.monitor));
    line.pair("-mon", "chardev=monitor,mode=control");
    line.0
}

/// What the kernel must know if its processor is emulated: no instruction is executed ahead of time, so that guarding against
/// what that would reveal only costs; and the counter is the host's own, however late its ticks come on a busy one.
pub(super) const TRANSLATED: &str = "mitigations=off tsc=reliable";

/// An emulated x86-64 processor: all that can be emulated, but no claim that bytes are moved fast by repeating an instruction.
/// Kernels and C libraries that believe it do so, and each repetition is executed: every copy would take several times as long.
pub(super) const TRANSLATED_PROCESSOR: &str = "max,-erms,-fsrm";

/// What the kernel must know on this kind of machine.
fn own_words(accelerator: &Accelerator) -> String {
    let console = if cfg!(target_arch = "x86_64") { "ttyS0" } else { "ttyAMA0" };
    // A guest that panics ends its machine at once.
    let mut words = format!("console={console} panic=-1 reboot=t");
    if let (Accelerator::Tcg { .. }, Some(khz)) = (accelerator, tsc_khz()) {
        // A translated guest sees this host's own counter. It would measure its rate against an emulated timer, which goes
        // wrong whenever the host is busy, and then waits for ever for a tick.
        words = format!("{words} {TRANSLATED} tsc_early_khz={khz}");
    }
    words
}

/// The rate of this processor's time stamp counter.
#[cfg(target_arch = "x86_64")]
fn tsc_khz() -> Option<u64> {
    use std::arch::x86_64::_rdtsc;
    // SAFETY: reads a counter that every processor of this architecture has.
    let counter = || unsafe { _rdtsc() };
    let (begun, first) = (Instant::now(), counter());
    // Between two readings nothing has to happen on time: both clocks go on if this thread does not.
    std::thread::sleep(std::time::Duration::from_millis(20));
    let (ticks, took) = (counter().wrapping_sub(first), begun.elapsed());
    u64::try_from(u128::from(ticks) * 1_000_000 / took.as_nanos().max(1)).ok()
}

#[cfg(not(target_arch = "x86_64"))]
fn tsc_khz() -> Option<u64> {
    None
}

/// A value whose end is a path: a comma in it is doubled, as QEMU reads it.
fn joined(before: &str, path: &Path) -> OsString {
    use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
    let mut bytes = before.as_bytes().to_vec();
    for byte in path.as_os_str().as_bytes() {
        bytes.push(*byte);
        if *byte == b',' {
            bytes.push(b',');
        }
    }
    OsString::from_vec(bytes)
}

#[derive(Debug, Default)]
struct Line(Vec<OsString>);

impl Line {
    fn add(&mut self, word: impl Into<OsString>) -> &mut Self {
        self.0.push(word.into());
        self
    }

    fn pair(&mut self, option: &str, value: impl Into<OsString>) -> &mut Self {
        self.add(option).add(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    #[test]
    fn a_comma_in_a_path_stays_in_it() {
        assert_eq!(joined("file=", &PathBuf::from("/a,b/c")), "file=/a,,b/c");
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn the_counter_has_a_plausible_rate() {
        let khz = tsc_khz().unwrap();
        assert!((100_000..20_000_000).contains(&khz), "{khz} kHz");
    }
}
