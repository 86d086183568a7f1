"The numbers of the pages: each module measures one thing and writes one JSON to `results`"
