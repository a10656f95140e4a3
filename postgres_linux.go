package main

import "syscall"

func init() {
	processAttributes = func(account *syscall.Credential) []*syscall.SysProcAttr {
		// The kernel tells PostgreSQL to shut down when rollcall is gone, kill -9 included.
		attr := syscall.SysProcAttr{Credential: account, Setpgid: true, Pdeathsig: syscall.SIGINT}
		// Below /root, PostgreSQL's user could not even reach its data: this one right of root lets it.
		// An ordinary user can't give it and needs none; nor can some sandboxes.
		override := attr
		override.AmbientCaps = []uintptr{1} // CAP_DAC_OVERRIDE of <linux/capability.h>
		return []*syscall.SysProcAttr{&override, &attr}
	}
}
