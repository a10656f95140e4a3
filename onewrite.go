package main

import "sync"

// One write an answer. By itself, net/http writes in two what is longer than its
// buffer of 4 KiB, and so wakes the caller twice: for a page of 20 users, a
// seventh of the whole cost.

var gatherings = sync.Pool{New: func() any { return new([]byte) }}

// gather holds back what is written from now on, until send. It is for the
// goroutine that serves the connection's requests: nobody else writes to it.
func (c *connection) gather() { c.gathered = gatherings.Get().(*[]byte) }

// send writes what was held back.
func (c *connection) send() error {
	err := c.flush()
	gatherings.Put(c.gathered)
	c.gathered = nil
	return err
}

func (c *connection) flush() (err error) {
	if len(*c.gathered) > 0 {
		_, err = c.socket.Write(*c.gathered)
		*c.gathered = (*c.gathered)[:0]
	}
	return err
}

func (c *connection) Write(p []byte) (int, error) {
	if c.gathered == nil {
		return c.socket.Write(p)
	}
	if len(*c.gathered)+len(p) <= smallBytes { // what is larger is not copied: one more write costs less
		*c.gathered = append(*c.gathered, p...)
		return len(p), nil
	}
	if err := c.flush(); err != nil {
		return 0, err
	}
	return c.socket.Write(p)
}
