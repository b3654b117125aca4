# Completion of blkholefs(8) for bash. It needs no other file.

# Sets `words` to the words up to the cursor. Bash divides them at = and : too; here they are whole.
_blkholefs_words() {
    local line=${COMP_LINE:0:COMP_POINT} word i
    words=()
    for ((i = 0; i <= COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        if ((i == 0)) || [[ $line == [[:space:]]* ]]; then
            line=${line#"${line%%[![:space:]]*}"}
            words+=("")
        fi
        ((i == COMP_CWORD)) && word=$line
        words[-1]+=$word
        line=${line#"$word"}
    done
}

# Offers those of the words that begin with what was typed, after a beginning that stays.
_blkholefs_offer() {
    local before=$1 word
    shift
    for word; do
        [[ $before$word == "$cur"* ]] && COMPREPLY+=("$before$word")
    done
}

# Offers directories, regular files and block devices. With "all", the names that udev knows devices by, too.
_blkholefs_files() {
    local before=$1 path name kind typed=${cur#"$1"}
    local -a found
    if [[ $typed =~ ^(UUID|LABEL|PARTUUID|PARTLABEL)= && ${2-} == all ]]; then
        kind=${BASH_REMATCH[1]}
        # Not a pattern of the shell, whose options may make one without matches an error.
        mapfile -t found < <(compgen -f -- "/dev/disk/by-${kind,,}/")
        for path in "${found[@]}"; do
            # udev writes a space as \x20. What is no such escape has no special characters.
            printf -v name '%b' "${path##*/}"
            _blkholefs_offer "$before" "$kind=$name"
        done
        return
    fi
    [[ $typed == "~/"* ]] && typed=$HOME${typed:1}
    mapfile -t found < <(compgen -f -- "$typed")
    for path in "${found[@]}"; do
        [[ -d $path || -f $path || -b $path ]] && COMPREPLY+=("$before$path")
    done
    # Adds a slash to directories, and quotes what must be quoted.
    ((${#COMPREPLY[@]})) && compopt -o filenames 2>/dev/null
    [[ ${2-} != all ]] || _blkholefs_offer "$before" UUID= LABEL= PARTUUID= PARTLABEL=
}

# Offers the directories where blkholefs has mounted something.
_blkholefs_mounted() {
    local directory type _
    while read -r _ directory type _; do
        [[ $type == fuse.blkholefs ]] || continue
        # The kernel writes a space as \040. As a format, so that no more than three digits belong to an escape.
        printf -v directory "${directory//%/%%}"
        _blkholefs_offer "" "$directory"
    done </proc/mounts
    compopt -o filenames 2>/dev/null
}

# Offers the options after -o, which are a list with commas.
_blkholefs_options() {
    local before=$1 typed=${cur#"$1"} item word
    local source="backing= cluster_size= compact nbd= since= thin_metadata= used"
    local mount="allow_other direct_io gid= map_cache= max_read= mode= name= nofail queue_depth= read_ahead= static uid= umask=
        writable ro rw exec noexec suid nosuid dev nodev sync async"
    item=${typed##*,}
    before+=${typed%"$item"}
    case $item in
        since=*) _blkholefs_files "${before}since=" ;;
        thin_metadata=* | backing=*) _blkholefs_files "$before${item%%=*}=" ;;
        cluster_size=*) _blkholefs_offer "${before}cluster_size=" 4K 8K 16K 32K 64K 128K 256K 512K 1M 2M ;;
        *=*) ;;
        *)
            [[ $command == mount ]] && source+=" $mount"
            for word in $source; do
                [[ ,$typed == *",$word"* ]] && continue
                _blkholefs_offer "$before" "$word"
            done
            ;;
    esac
}

# Offers the values of an option. Returns 1 if the option has none.
_blkholefs_value() {
    local option=$1 before=$2
    case $option in
        --format) _blkholefs_offer "$before" borg bmap ddrescue csi ;;
        --since | --against | --svg) _blkholefs_files "$before" ;;
        -o) _blkholefs_options "$before" ;;
        --offset | --length | --sample | --seed | --volume) ;;
        *) return 1 ;;
    esac
    return 0
}

# Offers the operands of a command, of which there are some already.
_blkholefs_operands() {
    local count=0 i
    for ((i = 2; i < ${#words[@]} - 1; i++)); do
        case ${words[i]} in
            -o | --format | --since | --against | --svg | --offset | --length | --sample | --seed | --volume) ((i++)) ;;
            -*) ;;
            *) ((count++)) ;;
        esac
    done
    case $command:$count in
        mount:0 | map:* | info:* | verify:0) _blkholefs_files "" all ;;
        mount:1)
            mapfile -t COMPREPLY < <(compgen -d -- "$cur")
            compopt -o filenames 2>/dev/null
            ;;
        umount:0 | status:*) _blkholefs_mounted ;;
    esac
}

_blkholefs() {
    local -a words
    local cur command options="" about="-h --help -V --version" i part keep
    # The lists of words are divided at blanks, whatever the user has set.
    local IFS=$' \t\n'
    COMPREPLY=()
    _blkholefs_words
    # What was typed may have quotes; the names that are offered have none.
    cur=${words[-1]#[\"\']}
    cur=${cur//\\/}
    command=${words[1]}
    if ((${#words[@]} == 2)); then
        _blkholefs_offer "" mount umount map info verify status demo
        [[ $cur == -* ]] && _blkholefs_offer "" $about
        return
    fi
    case $command in
        mount) options="-f --foreground -v -o" ;;
        umount) options="-f -l -v" ;;
        map) options="--json --totals --picture --ascii --svg --format --since --offset --length -o --volume" ;;
        info) options="--json -o --volume" ;;
        verify) options="--sample --seed --against -o --volume" ;;
        status) options="--json" ;;
    esac
    if _blkholefs_value "${words[-2]}" ""; then
        :
    elif [[ $cur == --*=* ]]; then
        _blkholefs_value "${cur%%=*}" "${cur%%=*}="
    elif [[ $cur == -o?* ]]; then
        _blkholefs_value -o -o
    elif [[ $cur == -* ]]; then
        _blkholefs_offer "" $options $about
    else
        _blkholefs_operands
    fi
    # An option or a name that needs a value is followed by no space.
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2>/dev/null
    # Bash replaces only the part of the word that it has as a word of its own, after the last = or :.
    part=${COMP_WORDS[COMP_CWORD]}
    [[ $part == [=:]* ]] && part=""
    keep=${words[-1]%"$part"}
    keep=${keep//\\/}
    for i in "${!COMPREPLY[@]}"; do
        COMPREPLY[i]=${COMPREPLY[i]#"$keep"}
    done
}

complete -F _blkholefs blkholefs
