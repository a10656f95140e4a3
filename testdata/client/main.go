// A client of the code that oapi-codegen makes of openapi.json: one create, and one list of
// two pages. "make client" puts both into a folder, and runs them.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"log"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"strings"
)

func main() {
	rollcall := exec.Command(os.Args[1], "-dev")
	rollcall.Env = append(os.Environ(), "AUTH=off", "PORT=0", "DATABASE_URL=", "DATABASE_URL_FILE=")
	output, err := rollcall.StderrPipe()
	if err == nil {
		err = rollcall.Start()
	}
	if err != nil {
		log.Fatal(err)
	}
	err = use(readAddress(bufio.NewScanner(output)))
	rollcall.Process.Signal(os.Interrupt)
	if stopErr := rollcall.Wait(); err == nil {
		err = stopErr
	}
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("a generated client has created users, and listed them page by page")
}

// readAddress reads the log until the service is ready, and returns where it listens.
func readAddress(lines *bufio.Scanner) (address string) {
	for lines.Scan() {
		var line struct{ Msg, Address string }
		json.Unmarshal(lines.Bytes(), &line)
		if line.Msg == "listening" {
			address = line.Address
		}
		if line.Msg == "ready" {
			break
		}
	}
	return address
}

func use(address string) error {
	ctx := context.Background()
	client, err := NewClientWithResponses("http://" + address)
	if err != nil {
		return err
	}
	for _, name := range []string{"Ada", "Grace"} {
		body := CreateUserJSONRequestBody{Email: strings.ToLower(name) + "@example.com", Name: name}
		created, err := client.CreateUserWithResponse(ctx, nil, body)
		if err != nil {
			return err
		}
		if created.JSON200 == nil || created.JSON200.Name != name {
			return fmt.Errorf("create: %s %s", created.Status(), created.Body)
		}
	}
	limit, names := 1, ""
	for params := (ListUsersParams{Limit: &limit}); ; {
		page, err := client.ListUsersWithResponse(ctx, &params)
		if err != nil {
			return err
		}
		if page.JSON200 == nil || len(*page.JSON200) != 1 {
			return fmt.Errorf("list: %s %s", page.Status(), page.Body)
		}
		names += (*page.JSON200)[0].Name + " "
		cursor := next(page.HTTPResponse)
		if cursor == "" {
			break
		}
		params.Cursor = &cursor
	}
	if names != "Grace Ada " {
		return fmt.Errorf("the list has %s", names)
	}
	return nil
}

// next returns the cursor of the Link to the next page, or nothing.
func next(resp *http.Response) string {
	link, _, _ := strings.Cut(strings.TrimPrefix(resp.Header.Get("Link"), "<"), ">")
	u, err := url.Parse(link)
	if err != nil {
		return ""
	}
	return u.Query().Get("cursor")
}
