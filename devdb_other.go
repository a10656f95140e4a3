//go:build !linux

package main

import "syscall"

// devCType is the locale of letters: in C, lower() would fold ASCII alone.
const devCType = "en_US.UTF-8"

// processAttributes returns how to start PostgreSQL: see devdb_linux.go, which can
// do more. Here PostgreSQL outlives a rollcall that was killed with kill -9, and the
// next start says how to end it; and as root, PostgreSQL's user has to be able to
// reach the folder.
func processAttributes(account *syscall.Credential) []*syscall.SysProcAttr {
	return []*syscall.SysProcAttr{{Credential: account, Setpgid: true}}
}
