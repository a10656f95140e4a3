package main

import "syscall"

// devCType is the locale of letters: in C, lower() would fold ASCII alone.
const devCType = "C.UTF-8"

// capDACOverride is CAP_DAC_OVERRIDE of <linux/capability.h>: root's right to enter
// and read whatever the permissions say.
const capDACOverride = 1

// processAttributes returns how to start PostgreSQL, the best way first.
func processAttributes(account *syscall.Credential) []*syscall.SysProcAttr {
	attr := syscall.SysProcAttr{
		Credential: account,
		// Ctrl-C goes to a whole process group. In one of its own, PostgreSQL is not
		// hit, and the requests in flight still find it while rollcall drains.
		Setpgid: true,
		// The kernel tells PostgreSQL to shut down if rollcall is gone.
		Pdeathsig: syscall.SIGINT,
	}
	if account == nil {
		return []*syscall.SysProcAttr{&attr}
	}
	// Below /root, PostgreSQL's user could not even reach its data: this one right of
	// root lets it. Where it can't be given, as in some sandboxes, the folder may
	// still be one that this user can reach.
	override := attr
	override.AmbientCaps = []uintptr{capDACOverride}
	return []*syscall.SysProcAttr{&override, &attr}
}
