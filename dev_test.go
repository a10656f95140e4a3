package main

import (
	"os"
	"path/filepath"
	"sync"
	"testing"
)

func TestDevSecret(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), ".dev")
	var wg sync.WaitGroup
	secrets := make([]string, 8)
	for i := range secrets { // all at once: they have to agree
		wg.Go(func() {
			secret, err := devSecret(dir)
			if err != nil {
				t.Error(err)
			}
			secrets[i] = secret
		})
	}
	wg.Wait()
	for _, s := range secrets {
		if len(s) < 32 || s != secrets[0] {
			t.Fatalf("got %q, want one secret of 32 bytes or more", secrets)
		}
	}
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 1 {
		t.Errorf("got %v, %v, want no file but the secret", files, err)
	}
	if info, err := os.Stat(filepath.Join(dir, "jwt_secret")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the file: %v, %v, want it readable for its owner alone", info.Mode(), err)
	}
	if other, _ := devSecret(t.TempDir()); other == secrets[0] {
		t.Error("another folder has the same secret")
	}
}
