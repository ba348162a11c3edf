//! Debian's own kernel is installed from its package, and boots.

mod support;

use std::process::{Command, Stdio};

use kiln_boot::{Kernels, Source, initramfs};
use kiln_contract::{Home, Silent};

/// Loads the modules as the guest does, and says so.
const INIT: &str = r#"
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <unistd.h>
int main(void) {
    char line[256];
    FILE *load = fopen("/modules/load", "r");
    while (load && fgets(line, sizeof line, load)) {
        line[strcspn(line, " \n")] = 0;
        int module = open(line, O_RDONLY | O_CLOEXEC);
        if (syscall(SYS_finit_module, module, "", 0)) printf("failed: %s: %s\n", line, strerror(errno));
        close(module);
    }
    printf("all is loaded\n");
    fflush(stdout);
    reboot(RB_AUTOBOOT);
}
"#;

#[test]
fn debians_kernel_boots_with_all_its_modules() {
    let Some(package) = kiln_fixtures::debian_kernel() else { return };
    let directory = tempfile::tempdir().unwrap();
    let kernels = Kernels::open(&Home::at(directory.path()));
    let kernel = kernels.install(&Source::Packages(vec![package]), None, &Silent).unwrap();
    assert!(kernel.record().absent.is_empty(), "{:?}", kernel.record().absent);
    if cfg!(target_arch = "x86_64") {
        assert!(kernel.record().pvh);
        assert_eq!(kernel.for_qemu(), kernel.directory().join("vmlinux"));
    }
    let bridge = kernel.record().modules.iter().find(|module| module.name == "bridge").unwrap();
    assert!(!bridge.at_boot && bridge.needs.contains(&"stp".to_owned()), "{bridge:?}");

    let (Some(qemu), Some(cc)) = (kiln_fixtures::require("qemu-system-x86_64"), kiln_fixtures::require("cc"))
    else {
        return;
    };
    if !cfg!(target_arch = "x86_64") {
        kiln_fixtures::skip("the machine of this test is an x86-64");
        return;
    }
    let (source, guest) = (directory.path().join("init.c"), directory.path().join("init"));
    std::fs::write(&source, INIT).unwrap();
    let made = Command::new(cc).arg("-static").arg("-o").arg(&guest).arg(&source).status().unwrap();
    assert!(made.success());
    let archive = directory.path().join("initramfs");
    std::fs::write(&archive, initramfs(&kernel, &std::fs::read(guest).unwrap()).unwrap()).unwrap();
    let output = Command::new("timeout")
        .arg("400")
        .arg(qemu)
        // Unlike `microvm` it has timers that an emulated kernel can measure its own by, however busy the host is.
        .args(["-M", "q35", "-accel", "tcg", "-cpu", "max", "-m", "256", "-no-reboot", "-nodefaults"])
        .args(["-display", "none", "-serial", "stdio"])
        .args(["-append", "console=ttyS0 quiet panic=-1 reboot=t"])
        .arg("-kernel")
        .arg(kernel.for_qemu())
        .arg("-initrd")
        .arg(archive)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("all is loaded"), "{said}");
    assert!(!said.contains("failed:"), "{said}");
}
